"""Reading a results store: values, states, and files that do not fit."""

import json
import math
import re

import numpy as np
import pytest
import stores

from recbole_mmdiff.errors import ConfigError, DataError
from recbole_mmdiff.report import Results, write_report
from recbole_mmdiff.report.results import smaller_is_better

CELL = stores.cell("MF", "s", "rating", 2020)


def plan_of(store, cells=(CELL,), **more):
    given = {"models": ["MF"], "settings": ["s"], "seeds": [2020]} | more
    stores.write_plan(store, list(cells), **given)


def test_values_come_from_where_their_names_say(tmp_path):
    plan_of(tmp_path)
    stores.finish(tmp_path, CELL, {"rating.mae": 0.5, "ranking_full.ndcg@20": 0.25})
    results = Results.load(tmp_path)
    cell, = results.plan.cells
    for metric, value in {"rating.mae": 0.5, "ranking_full.ndcg@20": 0.25, "throughput.training": 1000,
                          "seconds.evaluation": 1.5, "groups.cold_users.rating.mae": 0.5}.items():
        assert results.value(cell, metric) == value
    for metric in ("rating.rmse", "ranking_labeled.ndcg@20", "groups.warm_items.rating.mae", "seconds.x"):
        assert math.isnan(results.value(cell, metric))
    assert results.history(cell)[:1] == [("pretraining", 0, pytest.approx(1.5), pytest.approx(math.nan,
                                                                                             nan_ok=True))]


def test_a_pass_or_a_metric_may_be_null_or_nan(tmp_path):
    plan_of(tmp_path)
    path = tmp_path / CELL["folder"] / "metrics.json"
    stores.write_json(path, {"test": {"rating": None, "ranking_full": {"hit@20": None, "ndcg@20": math.nan}}})
    results = Results.load(tmp_path)
    for metric in ("rating.mae", "ranking_full.hit@20", "ranking_full.ndcg@20"):
        assert math.isnan(results.value(results.plan.cells[0], metric))


def test_states(tmp_path):
    cells = [stores.cell("MF", "s", "rating", seed) for seed in (1, 2, 3, 4)]
    plan_of(tmp_path, cells, seeds=[1, 2, 3, 4])
    stores.finish(tmp_path, cells[0], {"rating.mae": 1.0})
    stores.fail(tmp_path, cells[1], "no memory")
    stores.finish(tmp_path, cells[3], {"rating.mae": 1.0})
    stores.fail(tmp_path, cells[3], "at the first attempt")
    results = Results.load(tmp_path)
    assert [results.state(cell) for cell in results.plan.cells] == ["done", "failed", "pending", "done"]
    assert results.errors == {cells[1]["folder"]: "no memory"}


def test_users_with_several_requests_count_once_and_nan_is_left_out(tmp_path):
    plan_of(tmp_path)
    users = (["b", "a", "b", "c"], {"mae": [1.0, 2.0, 4.0, math.nan]})
    stores.finish(tmp_path, CELL, {"rating.mae": 1.0}, {"rating": users})
    results = Results.load(tmp_path)
    assert results.per_user(results.plan.cells[0], "rating.mae").to_dict() == {"a": 2.0, "b": 2.5}
    assert results.per_user(results.plan.cells[0], "rating.rmse") is None
    assert results.per_user(results.plan.cells[0], "throughput.training") is None


@pytest.mark.parametrize("metric, smaller", [
    ("rating.mae", True), ("rating.auc", False), ("ranking_full.averagepopularity@10", True),
    ("ranking_full.ndcg@10", False), ("seconds.training", True), ("throughput.training", False),
    ("groups.cold_users.rating.rmse", True), ("groups.cold_users.ranking_full.hit@5", False)])
def test_direction(metric, smaller):
    assert smaller_is_better(metric) is smaller


def refused(store, *words):
    with pytest.raises(DataError, match=".*".join(map(re.escape, words))) as caught:
        write_report(store, plots=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert not (store / "report").exists()


@pytest.mark.parametrize("key, value, words", [
    ("format", 2, ["format", "2"]),
    ("format", True, ["format"]),
    ("models", [], ["models", "empty"]),
    ("models", ["MF", "MF"], ["models", "twice"]),
    ("models", "MF", ["models", "a list"]),
    ("seeds", [1.5], ["seeds[0]", "whole number"]),
    ("tables", {"rating": {"metrics": ["mae"]}}, ["tables.rating.metrics", "'mae'"]),
    ("tables", {"rating": {}}, ["tables.rating.metrics", "missing"]),
    ("cells", [CELL, CELL], ["cells[1]", "cells[0]"]),
    ("cells", [CELL | {"model": "XX"}], ["cells[0].model", "XX"]),
    ("cells", [CELL | {"seed": "2020"}], ["cells[0].seed"]),
    ("cells", [CELL | {"folder": "../../etc"}], ["cells[0].folder", "in the store"]),
    ("cells", [CELL | {"folder": "/etc"}], ["cells[0].folder", "in the store"]),
    ("cells", [CELL | {"folder": "C:\\x"}], ["cells[0].folder", "in the store"]),
    ("cells", [CELL | {"folder": "x" * 300}], ["cells[0].folder", "in the store, in folders of plain names"]),
    ("cells", [CELL | {"folder": ""}], ["cells[0].folder", "in the store"]),
    ("cells", ["x" * 10**6], ["cells[0]", "an object"]),
    ("cells", [CELL | {"sweep": {"model": "MF", "value": 1}}], ["cells[0].sweep.key", "missing"]),
    ("ours", ["XX"], ["ours", "XX"]),
    ("published", {"source": "x", "models": ["MF"], "tolerance": {}, "values": {"s": {"rating.mae": [1, 2]}}},
     ["published.values.s.rating.mae", "2 values for 1"]),
    ("name", None, ["name", "text"]),
])
def test_a_plan_that_does_not_fit(tmp_path, key, value, words):
    plan_of(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    stores.write_json(tmp_path / "plan.json", plan | {key: value})
    refused(tmp_path, "plan.json", *words)


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "na', b"[1]", b"\xff\xfe", b"[" * 10**5,
                                     b'{"format": ' + b"9" * 10**4 + b"}"])
def test_a_plan_that_is_no_plan(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    refused(tmp_path, "plan.json")


def test_a_folder_that_is_no_store(tmp_path):
    refused(tmp_path, "there is no plan.json", "recbole-mmdiff compare")


@pytest.mark.parametrize("content, words", [
    (b'{"test": {"rating": {"mae": 0.', ["JSON"]),
    (b'{"test": {"rating": {"mae": "0.5"}}}', ["test.rating.mae", "a number"]),
    (b'{"test": {"rating": 0.5}}', ["test.rating", "an object"]),
    (b'{"test": {"rating": {"mae": 1' + b"0" * 400 + b"}}}", ["test.rating.mae", "finite"]),
    (b'"done"', ["an object"]),
])
def test_metrics_that_cannot_be_read(tmp_path, content, words):
    plan_of(tmp_path)
    stores.finish(tmp_path, CELL, {"rating.mae": 1.0})
    (tmp_path / CELL["folder"] / "metrics.json").write_bytes(content)
    refused(tmp_path, CELL["folder"] + "/metrics.json", *words)


@pytest.mark.parametrize("arrays, words", [
    ({"rating.user": np.array(["a", None], dtype=object)}, ["plain arrays"]),
    ({"rating.user": np.array(["a", "b"]), "rating.mae": np.ones(3)}, ["rating.mae", "2 users"]),
    ({"rating.user": np.array(["a", "b"]), "rating.mae": np.array(["x", "y"])}, ["rating.mae"]),
    ({"rating.user": np.array([1, 2]), "rating.mae": np.ones(2)}, ["rating.user", "tokens"]),
])
def test_arrays_that_do_not_fit(tmp_path, arrays, words):
    cells = [CELL, stores.cell("CMF", "s", "rating", 2020)]
    plan_of(tmp_path, cells, models=["MF", "CMF"])
    for cell in cells:
        stores.finish(tmp_path, cell, {"rating.mae": 1.0})
        np.savez(tmp_path / cell["folder"] / "per_user.npz", **arrays)
    refused(tmp_path, "per_user.npz", *words)


@pytest.mark.parametrize("keep", [0, 10, 300, -30])
def test_arrays_that_are_cut_off(tmp_path, keep):
    cells = [CELL, stores.cell("CMF", "s", "rating", 2020)]
    plan_of(tmp_path, cells, models=["MF", "CMF"])
    for cell in cells:
        users = ([f"u{number}" for number in range(100)], {"mae": np.arange(100.0)})
        stores.finish(tmp_path, cell, {"rating.mae": 1.0}, {"rating": users})
        path = tmp_path / cell["folder"] / "per_user.npz"
        path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, "per_user.npz")


def test_arguments_that_do_not_fit(full):
    with pytest.raises(ConfigError, match=r"ours: 'DiffCDRR'.*did you mean 'DiffCDR'"):
        write_report(full, ours=["DiffCDRR"], plots=False)
    with pytest.raises(ConfigError, match=r"rows: 'columns'.*settings.*models"):
        write_report(full, rows="columns", plots=False)
