"""The pages of the models are what their script writes now, and say what classes and properties say."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from recbole_mmdiff.cli import parse
from recbole_mmdiff.config import Config, find_config_file, parse_overrides
from recbole_mmdiff.config.sources import parse_value, properties_path, read_yaml
from recbole_mmdiff.model.registry import MODELS, get_model

DOCS = Path(__file__).resolve().parent.parent / "docs"
BULLET = re.compile(r"^ *- ", re.MULTILINE)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_model_pages", DOCS / "make_model_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def saved(model):
    return (DOCS / "models" / f"{model}.md").read_text(encoding="utf-8")


def test_pages_are_what_the_script_writes(script):
    written = script.pages()
    assert set(written) == {path.name for path in (DOCS / "models").iterdir()}
    old = [name for name, text in written.items() if saved(Path(name).stem) != text]
    assert not old, "run python -m docs.make_model_pages"


@pytest.mark.parametrize("model", MODELS)
def test_a_page_has_the_citation_and_every_deviation(model):
    cls, text = get_model(model), saved(model)
    assert f"| {cls.citation} |" in text
    told = text.partition("## Keys")[0].replace("\\", "").replace("`", "")
    assert len(BULLET.findall(told)) == len(BULLET.findall(cls.__doc__))
    for word in cls.__doc__.replace("``", "").split():
        assert word.strip(":*") in told, word


@pytest.mark.parametrize("model", MODELS)
def test_a_page_has_every_key_with_its_default(model):
    rows = [line.split(" | ", 3) for line in saved(model).partition("## Keys")[2].split("\n")
            if line.startswith("| `")]
    told = {key.strip("|` "): parse_value(default.strip("`")) for key, default, *_ in rows}
    assert told == read_yaml(properties_path() / "model" / f"{model}.yaml")


@pytest.mark.parametrize("model", MODELS)
def test_the_command_of_a_page_is_one(model):
    line = next(line for line in saved(model).split("\n") if line.startswith("| try it |"))
    options, rest = parse(shlex.split(line.split("`")[1])[1:])
    files = [find_config_file(name) for name in options.config]
    config = Config(options.model, config_file_list=files, overrides=parse_overrides(rest))
    assert config["model"] == model


def test_a_line_of_another_form_is_refused(script, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "MF.yaml").write_text("# MF\nepochs: 3   # (int)\nreg_weight: 0.1\n")
    monkeypatch.setattr(script, "properties_path", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"MF\.yaml, line 3: 'reg_weight: 0\.1' must have the form"):
        script.read_keys("MF")


@pytest.mark.parametrize(("text", "shown"), [
    ("a * b of <u, v>", "a \\* b of \\<u, v>"), ("``a * b`` c", "`a * b` c"), ("``a\n    b``", "`a b`"),
])
def test_prose_shows_the_same_signs(script, text, shown):
    assert script.prose(text) == shown


def test_indented_blocks_stay_and_lists_do_not(script):
    text = "x:\n\n    C(a * b)\n\nDeviations:\n    - one <a>\n      more"
    assert script.markdown(text) == "x:\n\n    C(a * b)\n\n## Deviations\n\n- one \\<a>\n  more"
