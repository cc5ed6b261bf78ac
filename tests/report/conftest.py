"""Stores that several test files read."""

import pytest
import stores

from recbole_mmdiff.report import Results


@pytest.fixture(scope="session")
def full(tmp_path_factory):
    """A store in which every run is done; not to be changed."""
    store = tmp_path_factory.mktemp("full")
    stores.full_store(store)
    return store


@pytest.fixture(scope="session")
def results(full):
    return Results.load(full)


@pytest.fixture
def one_row(tmp_path):
    """Makes a store of one table, one setting and one metric, out of values for every model and seed.

    A value may be a number, None (the model has none), "failed" or "pending".
    """
    def make(values, metric="rating.mae", setting="s", per_user=None, **plan):
        cells, seeds = [], [2020 + number for number in range(max(map(len, values.values())))]
        for model, row in values.items():
            for seed, value in zip(seeds, row, strict=False):
                cell = stores.cell(model, setting, "table", seed)
                cells.append(cell)
                if value == "failed":
                    stores.fail(tmp_path, cell)
                elif value != "pending":
                    users = (per_user or {}).get((model, seed))
                    stores.finish(tmp_path, cell, {metric: value}, users and {metric.split(".")[0]: users})
        tables = {"table": {"metrics": [metric]}}
        stores.write_plan(tmp_path, cells, **{"models": list(values), "settings": [setting],
                                              "seeds": seeds, "tables": tables} | plan)
        return Results.load(tmp_path)
    return make
