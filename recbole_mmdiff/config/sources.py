"""Where configuration comes from: YAML files, ``--key=value`` words, and how they merge."""

import re
from itertools import chain
from pathlib import Path

import yaml

from recbole_mmdiff.errors import ConfigError

#: values of a document, those that aliases repeat counted as often as they stand there, and their levels
MOST_VALUES, MOST_LEVELS = 1_000_000, 50
#: what yaml raises for text that is no YAML; also of tags (!!bool x) and of a nesting without end
NO_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


class Loader(yaml.SafeLoader):
    """YAML that builds plain types only, reads 1e-4 as a number, and refuses a key given twice, and a
    document that aliases make endless, or too large to be copied and shown."""

    def get_single_node(self):
        """The document as it is written."""
        node = super().get_single_node()
        values, levels = (0, 0) if node is None else _size(node, {})
        if values > MOST_VALUES or levels > MOST_LEVELS:
            raise yaml.composer.ComposerError(
                None, None, f"holds {values:,} values in {levels} levels, with those that aliases repeat; "
                f"{MOST_VALUES:,} in {MOST_LEVELS} are accepted", node.start_mark)
        return node

    def compose_mapping_node(self, anchor):
        """A mapping as it is written, before "<<" brings in others, whose keys may be overridden."""
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return node


def _size(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """The values and the levels in and beneath a node; ``known`` are those of others, None while they are
    counted.

    Raises:
        ComposerError: it stands beneath itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1, 1
    if id(node) not in known:
        known[id(node)] = None
        parts = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        values, levels = zip((0, 0), *(_size(part, known) for part in parts), strict=True)
        known[id(node)] = 1 + sum(values), 1 + max(levels)
    if known[id(node)] is None:
        raise yaml.composer.ComposerError(None, None, "an alias stands in what it names", node.start_mark)
    return known[id(node)]


# YAML 1.1 takes "1e-4" for a string, because it has no dot; every user means the number.
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def properties_path() -> Path:
    """The folder of default properties: inside the installed package, or of the checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "properties"
    return installed if installed.is_dir() else package.parent / "properties"


def find_config_file(name: str | Path) -> Path:
    """``name`` as given, or below the packaged ``properties``.

    Raises:
        ConfigError: neither exists.
    """
    relative = Path(*Path(name).parts[1:]) if Path(name).parts[:1] == ("properties",) else name
    for path in (Path(name), properties_path() / relative):
        if path.is_file():
            return path
    raise ConfigError(f"--config: there is no file {name!s}, neither here nor in the package")


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: unreadable file, YAML that does not parse, or something else than a mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error})") from error
    except NO_YAML as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: must hold 'key: value' lines, not a {type(content).__name__}")
    return content


def parse_value(text: str):
    """The value of a command-line word, read as YAML; text that is not YAML stays text."""
    try:
        return yaml.load(text, Loader=Loader)
    except NO_YAML:
        return text


def parse_overrides(words: list[str]) -> dict:
    """``["--a.b=1", "--c", "x"]`` as ``{"a": {"b": 1}, "c": "x"}``.

    Raises:
        ConfigError: a word that is no ``--key=value``, or a key given twice with two values.
    """
    overrides: dict = {}
    seen: dict[str, str] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"command line: {word!r} is not of the form --key=value")
        key, equals, text = word[2:].partition("=")
        if key.count(".") > MOST_LEVELS:
            raise ConfigError(f"command line: --{key:.60}... has more than {MOST_LEVELS} dots")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"command line: --{key} has no value, write --{key}=value")
            text = words.pop(0)
        if seen.setdefault(key, text) != text:
            raise ConfigError(f"command line: --{key} is given twice, {seen[key]!r} and {text!r}")
        value = parse_value(text)
        for part in reversed(key.split(".")):
            value = {part: value}
        overrides = merge(overrides, value)
    return overrides


def merge(below: dict, above: dict) -> dict:
    """``above`` laid over ``below``; mappings are merged key by key, all else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = merge(merged[key], value)
        merged[key] = value
    return merged
