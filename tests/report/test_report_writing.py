"""The report as a whole: its files, that they are the same every time, and what it may import."""

import os
import subprocess
import sys

import pytest
import stores

from recbole_mmdiff.report import Results, format_table, write_report
from recbole_mmdiff.report.writing import _names

TEXTS = ["results.csv", "statistics.csv", "tuned.csv", "table_rating.md", "table_rating.tex",
         "table_ranking.md", "table_ranking.tex", "report.md"]


def test_the_same_store_gives_the_same_texts(full, tmp_path):
    first, second = (write_report(full, tmp_path / name, plots=False) for name in ("a", "b/c"))
    assert [path.name for path in first] == TEXTS
    assert sorted(os.listdir(tmp_path / "a")) == sorted(TEXTS)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert write_report(full, tmp_path / "a", plots=False) == first


def test_the_page_holds_the_tables(full, tmp_path):
    write_report(full, tmp_path, ours=["EMCDR"], rows="models", plots=False)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert page.startswith("# ml1m-cold-start\n\n72 runs: 72 done, 0 failed, 0 pending.\n")
    assert format_table(Results.load(full), "rating", ["EMCDR"], "models") in page
    assert "ours (EMCDR)" in page and "## Pictures" not in page


def test_ours_of_the_plan_and_of_the_caller(tmp_path):
    stores.full_store(tmp_path, settings=["s"], ours=["MF"])
    results = Results.load(tmp_path)
    assert "ours (MF)" in format_table(results, "rating")
    assert "ours (CMF)" in format_table(results, "rating", ours="CMF")


def test_published_page(tmp_path):
    published = {"source": "x", "models": ["MF"], "tolerance": {}, "values": {"s": {"rating.mae": [0.8]}}}
    stores.full_store(tmp_path, settings=["s"], published=published)
    write_report(tmp_path, plots=False)
    assert "not judged" in (tmp_path / "report" / "published.md").read_text(encoding="utf-8")
    assert "(published.md)" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


def test_two_tables_may_show_the_same_runs(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [stores.cell(model, "s", "rating", 1) for model in ("MF", "CMF")]
    stores.finish(tmp_path, runs[0], {"rating.mae": 1.0, "ranking_full.ndcg@20": 0.5})
    stores.fail(tmp_path, runs[1])
    cells = [*runs, *(run | {"table": "ranking"} for run in runs)]
    stores.write_plan(tmp_path, cells, ["MF", "CMF"], ["s"], [1])
    names = [path.name for path in write_report(tmp_path)]
    assert "losses_rating.png" in names and "losses_ranking.png" not in names
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "2 runs: 1 done, 1 failed, 0 pending." in page and page.count("the training loss is NaN") == 1


def test_labels_of_sweeps_stand_in_no_table(tmp_path):
    sweep = {"model": "MF", "key": "size", "value": 8}
    cells = [stores.cell("MF", "s", "rating", 1), stores.cell("MF size=8", "s", "rating", 1, sweep)]
    for cell in cells:
        stores.finish(tmp_path, cell, {"rating.mae": 1.0})
    stores.write_plan(tmp_path, cells, ["MF", "MF size=8"], ["s"], [1])
    assert "size=8" not in format_table(Results.load(tmp_path), "rating")


def test_file_names_do_not_collide():
    assert _names(["a/b", "a b", "A_b", "c"]) == {"a/b": "a_b", "a b": "a_b_2", "A_b": "A_b_3", "c": "c"}


def test_table_names_stay_in_the_folder(tmp_path):
    tables = {"../../x": {"metrics": ["rating.mae"]}, "..": {"metrics": ["rating.mae"]}}
    stores.write_plan(tmp_path / "store", [], ["MF"], ["s"], [1], tables)
    paths = write_report(tmp_path / "store", plots=False)
    assert {path.parent for path in paths} == {tmp_path / "store" / "report"}
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize("plots", [False, True])
def test_the_room_needs_neither_torch_nor_recbole(full, tmp_path, plots):
    if plots:
        pytest.importorskip("matplotlib")
    code = (f"import sys\nsys.modules['recbole'] = None\n"
            f"from recbole_mmdiff.report import write_report\n"
            f"print({{'matplotlib', 'sklearn'}} & set(sys.modules))\n"
            f"write_report({str(full)!r}, {str(tmp_path)!r}, plots={plots})\n"
            f"print({{'torch', 'matplotlib.pyplot'}} & set(sys.modules))\n")
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\nset()\n", "")
