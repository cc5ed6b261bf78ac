"""Reading configuration: YAML, words of the command line, and how they merge."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_mmdiff.config.sources import (
    find_config_file,
    merge,
    parse_overrides,
    parse_value,
    properties_path,
    read_yaml,
)
from recbole_mmdiff.errors import ConfigError


@pytest.mark.parametrize(("text", "value"), [
    ("1e-4", 1e-4), ("1E5", 1e5), ("2.5e-3", 2.5e-3), ("-1e-4", -1e-4), (".5e1", 5.0), ("3", 3),
    ("0.5", 0.5), ("[1,2]", [1, 2]), ("[1e-4, x]", [1e-4, "x"]), ("{a: 1}", {"a": 1}),
    ("True", True), ("false", False), ("null", None), ("~", None), ("", None), ("BPR", "BPR"),
    ("'5'", "5"), ("1e", "1e"), ("e-4", "e-4"), ("a: b: c", "a: b: c"), ("[1,", "[1,"),
    ("[0,inf)", "[0,inf)"), ("2014-13-45", "2014-13-45"), ("0b_", "0b_"), ("a=b", "a=b"),
    ('__import__("os").getcwd()', '__import__("os").getcwd()'), ("1 + 1", "1 + 1"),
    ("lambda: 0", {"lambda": 0}),
])
def test_values_are_yaml_and_nothing_else(text, value):
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_a_plain_value(text):
    assert isinstance(parse_value(text), (str, int, float, bool, list, dict, set, bytes, type(None))) \
        or type(parse_value(text)).__module__ == "datetime"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.getcwd []", "!!python/name:os.system",
                                 "!!python/object:builtins.object {}", "!!python/module:os"])
def test_python_tags_stay_text_or_are_refused(tag, tmp_path):
    assert parse_value(tag) == tag
    (tmp_path / "a.yaml").write_text(f"key: {tag}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: is not valid YAML"):
        read_yaml(tmp_path / "a.yaml")


def test_words_become_nested_keys():
    assert parse_overrides(["--a=1", "--b.c=x", "--b.d", "[1]", "--e.f.g=1e-3", "--h=a=b"]) \
        == {"a": 1, "b": {"c": "x", "d": [1]}, "e": {"f": {"g": 1e-3}}, "h": "a=b"}


def test_a_key_may_be_repeated_with_the_same_value():
    assert parse_overrides(["--a=1", "--a=1"]) == {"a": 1}
    with pytest.raises(ConfigError, match="--a is given twice, '1' and '2'"):
        parse_overrides(["--a=1", "--a", "2"])


@pytest.mark.parametrize("words", [["a=1"], ["-a=1"], ["--"], ["--a"], ["--a", "--b=1"]])
def test_words_that_are_no_keys(words):
    with pytest.raises(ConfigError, match="command line"):
        parse_overrides(words)


def test_a_negative_number_is_a_value():
    assert parse_overrides(["--a", "-5", "--b=-1e-2"]) == {"a": -5, "b": -0.01}


TREES = st.dictionaries(st.sampled_from("abc"), st.recursive(
    st.integers() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=6),
    max_size=3)


def flat(tree, path=()):
    """{path: leaf}; an empty mapping is a leaf too."""
    if isinstance(tree, dict) and tree:
        return {key: leaf for name, value in tree.items()
                for key, leaf in flat(value, (*path, name)).items()}
    return {path: tree}


@settings(max_examples=200, deadline=None)
@given(TREES, TREES)
def test_merging_replaces_leaves_and_keeps_the_rest(below, above):
    before = repr(below), repr(above)
    merged = merge(below, above)
    assert (repr(below), repr(above)) == before
    leaves = flat(merged)
    for path, leaf in flat(above).items():
        if leaf != {}:
            assert leaves[path] == leaf
    for path, leaf in flat(below).items():
        hidden = any(path[:n] in flat(above) and flat(above)[path[:n]] != {}
                     for n in range(1, len(path) + 1))
        nested = any(other[:len(path)] == path for other in flat(above))
        if path and leaf != {} and not hidden and not nested:
            assert leaves[path] == leaf


def test_files_are_found_here_or_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model/MF.yaml", "properties/model/MF.yaml"):
        assert find_config_file(name) == properties_path() / "model" / "MF.yaml"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "MF.yaml").write_text("epochs: 1\n")
    assert find_config_file("model/MF.yaml").resolve() == tmp_path / "model" / "MF.yaml"
    with pytest.raises(ConfigError, match=r"no file none\.yaml"):
        find_config_file("none.yaml")


def test_an_empty_file_is_an_empty_mapping(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "a.yaml") == {}
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_every_shipped_file_parses_and_comments_each_key():
    for path in sorted(properties_path().rglob("*.yaml")):
        assert isinstance(read_yaml(path), dict), path
        assert yaml.safe_load(path.read_text(encoding="utf-8")) is not None
    for path in [properties_path() / "overall.yaml", *(properties_path() / "model").glob("*.yaml")]:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith(("#", " ")):
                assert "# (" in line, f"{path}: {line}"


def test_a_key_given_twice_is_refused(tmp_path):
    """YAML's readers let the last one win, and a model of a comparison is gone without a word."""
    path = tmp_path / "twice.yaml"
    path.write_text("models:\n  MF: {epochs: 1}\n  MF: {epochs: 2}\n")
    with pytest.raises(ConfigError, match=r"twice.yaml.*'MF' is given twice"):
        read_yaml(path)


def test_merged_mappings_may_be_overridden(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 3, "y": 4}}


BOMB = "\n".join(["b0: &b0 [x]", *(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]" for n in range(1, 10))])
MERGES = "\n".join(["b0: &b0 {x: 1}",
                    *(f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}'] * 10)}]}}" for n in range(1, 10))])


@pytest.mark.parametrize(("text", "message"), [
    (BOMB, "holds 2,345,679,022 values in 12 levels"), (MERGES, "values in"),
    ("a: &a [1, *a]", "in what it names"), ("a: &a {b: *a}", "in what it names"),
    ("a: " + "[" * 60 + "]" * 60, "in 61 levels"), ("a: " + "[" * 5000, ""), ("a: !!bool x", ""),
    ("a: !!int x", ""), ("a: !!timestamp x", ""), ("a: !!int ''", "")])
def test_what_no_configuration_is(text, message, tmp_path):
    """Values without end could not be copied, shown or saved."""
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)a\.yaml: is not valid YAML: .*{message}"):
        read_yaml(path)
    value = text.partition(": ")[2]
    assert parse_value(value) == value or isinstance(parse_value(value), (list, dict))


def test_a_key_of_many_dots():
    with pytest.raises(ConfigError, match="has more than 50 dots"):
        parse_overrides([f"--{'a.' * 2000}b=1"])
