"""Pictures: that each is drawn at a sane size, and the numbers in them."""

import math
import sys

import numpy as np
import pytest
import stores

pytest.importorskip("matplotlib")
from matplotlib import rcParams
from matplotlib.image import imread
from scipy import stats

from recbole_mmdiff.errors import ConfigError, DataError
from recbole_mmdiff.report import Results, write_report
from recbole_mmdiff.report.critical_difference import (
    block_values,
    critical_difference_plot,
    rank_models,
    too_few,
)
from recbole_mmdiff.report.embeddings import choose_points, embedding_plot, project
from recbole_mmdiff.report.figures import colours, shorten, use_log
from recbole_mmdiff.report.plots import bar_plot, loss_curves, sensitivity_plot, sweep_summaries, sweeps

SIZE = (300, 6000)


def check(paths, count=1):
    """The pictures are there, have sane sizes, and show something."""
    assert len(paths) == count
    for path in paths:
        assert path.stat().st_size > 1000
        if path.suffix == ".png":
            picture = imread(path)
            assert all(SIZE[0] <= side <= SIZE[1] for side in picture.shape[:2])
            assert picture[..., :3].std() > 0.01
        else:
            assert path.read_bytes().startswith(b"%PDF")


def test_a_whole_report(tmp_path):
    cells = stores.full_store(tmp_path, settings=stores.SETTINGS[:2], users=10)
    stores.add_sweep(tmp_path, cells, "DiffCDR", "task/weight", [10, 0.01, 1], stores.SETTINGS[:2])
    stores.write_plan(tmp_path, cells, settings=stores.SETTINGS[:2])
    before = dict(rcParams)
    paths = write_report(tmp_path)
    assert dict(rcParams) == before
    pictures = [path for path in paths if path.suffix == ".png"]
    assert {path.name for path in pictures} == {
        *(f"{kind}_{table}_{metric}.png" for kind in ("bars", "ranks") for table in stores.TABLES
          for metric in stores.TABLES[table]["metrics"]),
        "losses_rating.png", "losses_ranking.png", "sensitivity_DiffCDR_task_weight_rating.png"}
    check(pictures, 11)
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert all(f"]({path.name})" in page for path in pictures) and "Left out" not in page
    assert not [path for path in (tmp_path / "report").iterdir() if path.name.startswith(".")]


def test_one_model_one_seed_constant_values(one_row, tmp_path):
    one_row({"A": [0.0]})
    paths = write_report(tmp_path, pdf=True)
    check([path for path in paths if path.suffix in (".png", ".pdf")], 4)
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "- Left out: critical differences of rating.mae (table): 1 models have values, it takes 3." in page


def test_nothing_done_yet(one_row, tmp_path):
    one_row({"A": ["pending"], "B": ["failed"]})
    paths = write_report(tmp_path)
    assert not [path for path in paths if path.suffix == ".png"]
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "2 runs: 0 done, 1 failed, 1 pending." in page and page.count("Left out") == 3
    assert "B, s, table, seed 2020" in page and "the training loss is NaN" in page


@pytest.mark.parametrize("values", [
    {"A": [-1.0, -1.2], "B": [-0.5, -0.4]}, {"A": [0.91, 0.92], "B": ["failed", None]},
    {"A": [1e6, 1e6], "B": [1e-6, 1e-6]}, {"A $x$ _{": [0.7, 0.7], "B" * 200: [0.7, 0.7]}])
def test_bars_of_odd_values(one_row, tmp_path, values):
    check(bar_plot(one_row(values, setting="long " * 30), "table", "rating.mae", tmp_path / "x"))


def test_the_losses_of_one_epoch_and_of_a_history_with_gaps(one_row, tmp_path):
    results = one_row({"A": [0.5], "B": [0.6]})
    entry = {"stage": "one", "epoch": 0, "loss": 1e-3, "valid_score": None, "seconds": 1}
    folders = [cell.folder for cell in results.plan.cells]
    results.metrics[folders[0]]["history"] = [entry]
    results.metrics[folders[1]]["history"] = [entry | {"epoch": at, "loss": loss}
                                              for at, loss in enumerate([5.0, None, [1.0, math.nan], 0.5])]
    check(loss_curves(results, "table", tmp_path / "x"))
    for folder in folders:
        results.metrics[folder]["history"] = []
    assert loss_curves(results, "table", tmp_path / "y") == []
    results.metrics[folders[0]]["history"] = [entry | {"loss": None}]
    assert loss_curves(results, "table", tmp_path / "y") == []
    results.metrics[folders[0]]["history"] = [entry | {"stage": 3}]
    with pytest.raises(DataError, match=r"metrics\.json: history\[0\]\.stage"):
        loss_curves(results, "table", tmp_path / "y")


@pytest.mark.parametrize("values", [[0.001, 1, 10], [-1, 0, 1], [8], ["linear", "cosine", None],
                                    [True, False], [[64], [128, 64]]])
def test_sensitivity(tmp_path, values):
    cells = stores.add_sweep(tmp_path, [], "A", "key", values, ["s"], [1, 2])
    stores.write_plan(tmp_path, cells, ["A"], ["s"], [1, 2])
    results = Results.load(tmp_path)
    assert sweeps(results) == [("A", "key", "rating")] and results.models("rating") == []
    check(sensitivity_plot(results, "A", "key", "rating", tmp_path / "x"))


def test_swept_values_are_ordered_and_averaged_over_seeds(tmp_path):
    cells = stores.add_sweep(tmp_path, [], "A", "key", [3, 1, 2], ["s"], [1, 2])
    stores.write_plan(tmp_path, cells, ["A"], ["s"], [1, 2])
    results = Results.load(tmp_path)
    curve = sweep_summaries(results, "A", "key", "rating", "rating.mae")["s"]
    assert [value for value, _ in curve] == [1, 2, 3]
    ones = [results.value(cell, "rating.mae") for cell in results.plan.cells if cell.sweep.value == 1]
    assert curve[0][1].mean == pytest.approx(np.mean(ones))
    assert curve[0][1].sd == pytest.approx(np.std(ones, ddof=1))


def test_ranks_friedman_and_the_critical_difference():
    values = np.random.default_rng(0).normal([0, 0.2, 1, 3], 0.5, (12, 4))
    ranking = rank_models(list("ABCD"), values, smaller=True)
    slow = {label: np.mean([1 + sum(other < row[at] for other in row) for row in values])
            for at, label in enumerate("ABCD")}
    assert dict(zip(ranking.models, ranking.ranks, strict=True)) == pytest.approx(slow)
    assert list(ranking.ranks) == sorted(ranking.ranks)
    assert ranking.friedman_p == pytest.approx(stats.friedmanchisquare(*values.T).pvalue)
    # q of Table 5 in Demšar (2006) for four classifiers.
    assert ranking.critical_difference == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 12)), rel=1e-3)
    assert rank_models(list("ABCD"), -values, smaller=False) == ranking


def test_cliques_are_the_maximal_groups():
    ranking = rank_models(list("ABC"), np.tile([1.0, 2.0, 3.0], (20, 1)), smaller=True)
    assert ranking.cliques() == []
    equal = rank_models(list("ABC"), np.ones((4, 3)), smaller=True)
    assert (equal.cliques(), equal.friedman_p, equal.ranks) == ([(0, 2)], 1.0, (2.0, 2.0, 2.0))
    some = type(ranking)(tuple("ABCD"), (1.0, 1.5, 2.4, 4.0), 5, 0.01, 1.0)
    assert some.cliques() == [(0, 1), (1, 2)]


def test_blocks_are_those_with_a_value_of_every_model(one_row, tmp_path):
    rows = {"A": [1, 2, 3, 4], "B": [2, 3, 4, "failed"], "C": [3, 4, 5, 6], "D": [None] * 4}
    results = one_row(rows)
    models, values = block_values(results, "table", "rating.mae")
    assert models == ["A", "B", "C"] and values.tolist() == [[1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert too_few(models, values) is None
    check(critical_difference_plot(results, "table", "rating.mae", tmp_path / "x"))
    assert "2 blocks" in too_few(models, values[:2])
    constant = one_row({label: [1.0] * 3 for label in "ABC"})
    check(critical_difference_plot(constant, "table", "rating.mae", tmp_path / "x"))


def test_embeddings(tmp_path):
    stores.write_embeddings(tmp_path, 15)
    check(embedding_plot(tmp_path / "embeddings.npz", tmp_path / "x"))


@pytest.mark.parametrize("shape", [(1, 3), (5, 1), (5, 2), (3, 4)])
def test_embeddings_of_few_points(tmp_path, shape):
    for number, vectors in enumerate((np.ones(shape), np.random.default_rng(0).normal(size=shape))):
        np.savez(tmp_path / "e.npz", vectors=vectors, kind=np.full(shape[0], "truth"),
                 panel=np.full(shape[0], "one"))
        check(embedding_plot(tmp_path / "e.npz", tmp_path / f"x{number}"))


def test_points_and_projection_are_the_same_at_every_call():
    kind = np.array(["a"] * 50 + ["b"] * 5)
    chosen = choose_points(kind, 10)
    assert (kind[chosen] == "a").sum() == 10 and (kind[chosen] == "b").sum() == 5
    assert (choose_points(kind, 10) == chosen).all()
    vectors = np.random.default_rng(0).normal(size=(20, 4))
    assert (project(vectors) == project(vectors)).all()
    assert project(vectors[:3]) is None


@pytest.mark.parametrize("change, words", [
    ({"kind": np.array(["truth"])}, "kind: must be one text"),
    ({"vectors": np.full((4, 2), math.nan)}, "vectors: holds values"),
    ({"vectors": np.ones(4)}, "vectors: must be rows"),
    ({"panel": np.array(["a", None, "b", "c"], dtype=object)}, "plain arrays"),
    ({"panel": None}, "panel: is missing")])
def test_embeddings_that_do_not_fit(tmp_path, change, words):
    arrays = {"vectors": np.ones((4, 2)), "kind": np.full(4, "truth"), "panel": np.full(4, "a")} | change
    np.savez(tmp_path / "e.npz", **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(DataError, match=rf"e\.npz.*{words}"):
        embedding_plot(tmp_path / "e.npz", tmp_path / "x")


def test_without_matplotlib_the_error_says_what_to_install(one_row, tmp_path, monkeypatch):
    one_row({"A": [0.5], "B": [0.6]})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r'pip install "recbole-mmdiff\[viz\]"'):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()
    assert write_report(tmp_path, plots=False)


def test_colours_differ_and_are_not_black_or_grey():
    found = [tuple(np.round(colour, 3)) for colour in colours(20)]
    assert len(set(found)) == 20
    assert all(max(colour[:3]) - min(colour[:3]) > 0.1 for colour in found)


def test_labels_are_cut_in_the_middle():
    assert shorten("a  b\nc", 10) == "a b c"
    assert shorten("DiffCDR, guidance 2.0", 11) == "DiffC…e 2.0" and len(shorten("x" * 99, 10)) == 10


@pytest.mark.parametrize("values, log", [([1, 100], True), ([1, 99], False), ([0, 100], False),
                                         ([-1, 100], False), ([], False), ([math.nan, 1, 1000], True)])
def test_log_scales(values, log):
    assert use_log(values) is log
