"""docs/adding_a_model.md as a reader takes it: its files are written, its commands are run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "adding_a_model.md").read_text(encoding="utf-8")
FILES = re.compile(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the page's files, and what the page's commands leave in it."""
    folder = tmp_path_factory.mktemp("page")
    for name, text in FILES.findall(PAGE):
        (folder / name).write_text(text, encoding="utf-8")
    for line in "".join(COMMANDS.findall(PAGE)).splitlines():
        program, *words = shlex.split(line)
        assert program == "python"
        done = run([sys.executable, *words], folder)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    return folder


def run(words, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_the_model_runs_and_learns(folder):
    told = metrics(folder / "one_taste_run")
    assert told["model"] == "OneTaste" and told["dataset"] == "ml100k-pair" and told["seed"] == 7
    losses = [entry["loss"] for entry in told["history"]]
    assert losses[-1] < losses[0]
    assert 0.6 < told["test"]["rating"]["mae"] < 0.9


def test_the_model_is_compared(folder):
    store = folder / "one_taste_store"
    found = {metrics(cell)["model"]: metrics(cell)["test"]["rating"] for cell in store.glob("cells/*")}
    assert set(found) == {"Bias", "OneTaste"}
    table = (store / "report" / "table_rating.md").read_text(encoding="utf-8")
    for values in found.values():
        assert f"{values['mae']:.4f}" in table


def test_all_files_and_commands_of_the_page_are_run():
    assert [name for name, _ in FILES.findall(PAGE)] \
        == ["one_taste.py", "one_taste.yaml", "one_taste_compare.yaml"]
    assert len(COMMANDS.findall(PAGE)) == 2
