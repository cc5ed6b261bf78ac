"""Write docs/models: a page for every registered model, out of its class and its properties.

    python -m docs.make_model_pages

A page is the docstring and the citation of the class, what its attributes say of its kind, and the keys of
``properties/model/<Model>.yaml`` with their defaults and comments. A test compares the pages with what this
writes now.
"""

import inspect
import re
from pathlib import Path

from recbole_mmdiff.config.sources import properties_path
from recbole_mmdiff.files import write_atomically
from recbole_mmdiff.model.registry import MODELS, get_model

FOLDER = Path(__file__).resolve().parent / "models"
NOTE = "<!-- Made by docs/make_model_pages.py: change the class or its properties, and run it. -->"
INDEX = "README.md"

_KEY = re.compile(r"(\w+): (.*?) +# \((\w+)\) ?(.*)")
_CODE = re.compile(r"``(.+?)``", re.DOTALL)
_SIGN = re.compile(r"([<*])")      # of Markdown's own
_ESCAPED = re.compile(r"\\([<*])")


def pages() -> dict[str, str]:
    """file name -> text, of all pages and their index."""
    models = sorted(MODELS, key=str.lower)
    return {INDEX: index(models), **{f"{model}.md": page(model) for model in models}}


def index(models: list[str]) -> str:
    """The table of all models."""
    rows = [f"| [{model}]({model}.md) | {kind(model)} | {prose(get_model(model).citation)} |"
            for model in models]
    return "\n".join([NOTE, "# The models", "",
                      "What all models share, such as splits, negatives and evaluation, is explained in "
                      "[properties/overall.yaml](../../properties/overall.yaml). A model of your own: "
                      "[adding_a_model.md](../adding_a_model.md).", "",
                      "| model | kind | paper |", "|---|---|---|", *rows, ""])


def page(model: str) -> str:
    """The page of one model."""
    cls = get_model(model)
    summary, _, rest = inspect.getdoc(cls).partition("\n")
    code = "/".join(cls.__module__.split(".")) + ".py"
    facts = [("kind", kind(model)), ("paper", prose(cls.citation)), ("try it", f"`{command(model)}`"),
             ("code", f"[{code}](../../{code})")]
    if (properties_path() / "plain" / f"{model}.yaml").is_file():
        facts.insert(3, ("its paper's form", "`--paper=True` "
                         f"([properties/plain/{model}.yaml](../../properties/plain/{model}.yaml))"))
    return "\n".join([NOTE, f"# {model}", "", prose(summary), "", "| | |", "|---|---|",
                      *(f"| {name} | {text} |" for name, text in facts), "", markdown(rest.strip("\n")), "",
                      *key_table(model)])


def kind(model: str) -> str:
    """What a model works on, and what it predicts, in a few words."""
    cls, keys = get_model(model), {key for key, *_ in read_keys(model)[1]}
    plug_in = hasattr(cls, "backbone_class")
    if hasattr(cls, "vectors_of"):
        domains = "both domains at once"
    elif cls.needs_source:
        domains = "source to target domain"
    else:
        domains = "one domain or two" if cls.uses_source else "one domain"
    features = "features" if plug_in or "modalities" in keys else "ids"
    if "item_exploration" in keys:
        features = "ids or features"
    return "; ".join([*["plug-in"] * plug_in, domains, features,
                      "predicts ratings" if cls.predicts_ratings else "ranks"])


def command(model: str) -> str:
    """A command that trains the model on the embedded data."""
    recipe = properties_path() / f"{model.lower()}.yaml"
    if recipe.is_file():
        return f"recbole-mmdiff --config {recipe.name}"
    cls = get_model(model)
    if hasattr(cls, "vectors_of"):
        return f"recbole-mmdiff --model={model} --split_protocol=ratio"
    if not (cls.needs_source or cls.predicts_ratings):
        return f"recbole-mmdiff --config ccdrec.yaml --model={model}"
    return f"recbole-mmdiff --model={model}"


def key_table(model: str) -> list[str]:
    """The lines of a model's keys, defaults and comments."""
    about, keys = read_keys(model)
    rows = [f"| `{key}` | {cell(f'`{default}`')} | {type_} | {cell(prose(comment))} |"
            for key, default, type_, comment in keys]
    return ["## Keys", "", prose(about), "", "| key | default | type | what it is |", "|---|---|---|---|",
            *rows, ""]


def read_keys(model: str) -> tuple[str, list[tuple[str, str, str, str]]]:
    """The comment at the head of a model's properties, and (key, default, type, comment) of its lines.

    Raises:
        ValueError: a line has another form than ``key: default   # (type) comment``.
    """
    path = properties_path() / "model" / f"{model}.yaml"
    about, keys = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("# "):
            about.append(line[2:])
        elif match := _KEY.fullmatch(line):
            keys.append(match.groups())
        else:
            raise ValueError(f"{path}, line {number}: {line!r} must have the form 'key: default   # (type) "
                             f"comment'")
    return " ".join(about), keys


def markdown(text: str) -> str:
    """The body of a docstring: its list of deviations gets a heading, indented blocks stay as they are."""
    lines, in_list = [], False
    for line in prose(text).split("\n"):
        if re.fullmatch(r"Deviations[^:]*:", line):
            lines += [f"## {line[:-1]}", ""]
            in_list = True
        elif in_list:
            lines.append(line[4:])
        else:
            lines.append(_as_it_was(line) if line.startswith("    ") else line)
    return "\n".join(lines)


def prose(text: str) -> str:
    """Plain text with ``code`` in it as Markdown that shows the same signs."""
    return _CODE.sub(lambda code: "`" + " ".join(_as_it_was(code[1]).split()) + "`",
                     _SIGN.sub(r"\\\1", text))


def _as_it_was(text: str) -> str:
    """Markdown shows code without its own signs: no need of what ``prose`` puts before them."""
    return _ESCAPED.sub(r"\1", text)


def cell(text: str) -> str:
    """Text of one cell of a table."""
    return text.replace("|", "\\|")


def main() -> None:
    """Write all pages, and remove those of models that are gone."""
    FOLDER.mkdir(exist_ok=True)
    written = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in written:
            path.unlink()
    for name, text in written.items():
        with write_atomically(FOLDER / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
