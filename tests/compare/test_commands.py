"""``recbole-mmdiff compare`` and ``report`` on the command line."""

import sys

import pytest

from recbole_mmdiff.cli import main


def test_one_command_writes_the_table(write_comparison, tmp_path, inline, capsys):
    path, store = write_comparison(), tmp_path / "store"
    assert main(["compare", "--config", str(path), "--output", str(store), "--epochs=1"]) == 0
    shown = capsys.readouterr()
    assert "| default | rating.mae ↓ |" in shown.out and f"report: {store / 'report'}" in shown.out
    assert "4 cells, 4 to run" in shown.err and "[cell 4/4" in shown.err
    assert {"table_rating.md", "table_rating.tex", "results.csv", "statistics.csv"} \
        <= {file.name for file in (store / "report").iterdir()}
    assert list((store / "report").glob("*.png"))
    # Overrides lie above all keys of the file.
    assert all("epochs: 1\n" in file.read_text() for file in store.glob("cells/*/config.yaml"))
    assert main(["report", str(store), "--output", str(tmp_path / "else"), "--rows=models",
                 "--no-plots"]) == 0
    assert "| CMF |" in capsys.readouterr().out
    assert not list((tmp_path / "else").glob("*.png"))
    assert main(["report", str(store), "--ours=MF", "--pdf"]) == 0
    assert "improvement %: the best of ours" in capsys.readouterr().out
    assert list((store / "report").glob("*.pdf"))


def test_a_failed_cell_is_told_and_is_no_success(write_comparison, tmp_path, inline, capsys):
    path = write_comparison(models={"MF": {}, "wild": {"model": "MF", "learning_rate": 1e30}}, seeds=[1])
    assert main(["compare", "--config", str(path), "--output", str(tmp_path / "s"), "--no-plots"]) == 1
    shown = capsys.readouterr()
    assert "failed: wild, default, rating, seed 1: see" in shown.err
    assert "failed" in shown.out    # its place in the table


@pytest.mark.parametrize(("words", "message"), [
    (["compare"], "give one comparison file"),
    (["compare", "--config=nothing.yaml"], "there is no file nothing.yaml"),
    (["report", "nothing"], "there is no plan.json in nothing"),
    (["report", "nothing", "--epochs=3"], "'--epochs=3' is not known"),
])
def test_mistakes_are_told_in_one_line(words, message, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_missing_matplotlib_is_found_before_anything_runs(write_comparison, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write_comparison()
    assert main(["compare", "--config", str(path), "--output", str(tmp_path / "store")]) == 2
    assert "recbole-mmdiff[viz]" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
