"""Every recipe and every properties file builds a configuration, and its keys are read by its models."""

import math
import re
from pathlib import Path

import pytest

from recbole_mmdiff.compare.cells import cell_config
from recbole_mmdiff.compare.plan import Comparison
from recbole_mmdiff.compare.runner import check_metrics
from recbole_mmdiff.config import Config, find_config_file, properties_path
from recbole_mmdiff.config.sources import read_yaml
from recbole_mmdiff.model import MODELS

RUNS = sorted(properties_path().glob("*.yaml"))
RUN_RECIPES = [path for path in RUNS if "model" in read_yaml(path)]
PAPER = sorted((properties_path() / "paper").glob("*.yaml"))
COMPARISONS = [*PAPER, *sorted((properties_path() / "compare").glob("*.yaml"))]


@pytest.mark.parametrize("path", RUN_RECIPES, ids=lambda path: path.name)
def test_run_recipes_name_a_model_and_data(path):
    config = Config(config_file_list=[path])
    assert config["model"] in MODELS and config.cross_domain


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.name)
def test_every_model_key_and_metric_of_a_comparison_exists(path):
    """Each model in each table once, and each setting once."""
    comparison, seen = Comparison.read(path), set()
    for cell in comparison.cells():
        for place in ((cell.model, cell.table), cell.setting):
            if place not in seen:
                seen.add(place)
                config = cell_config(cell.keys, cell.files, {})
                assert config.cross_domain
                assert {key: config[key] for key in cell.keys if key != "dataset"
                        and not isinstance(cell.keys[key], dict)} \
                    == {key: value for key, value in cell.keys.items() if key != "dataset"
                        and not isinstance(value, dict)}
                check_metrics(config, comparison.tables[cell.table]["metrics"])


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.name)
def test_paper_recipes_say_what_was_published(path):
    comparison = Comparison.read(path)
    assert re.fullmatch(r"[a-z0-9]+_(table|figure|grids)\d*\.yaml", path.name)
    assert comparison.preset, "name the data preparation that the settings need"
    published = comparison.published
    if path.stem.split("_")[1].startswith("table"):
        assert published["source"] and published["values"]
    for metric, tolerance in (published or {}).get("tolerance", {}).items():
        assert 0 < tolerance < 0.2, metric
    labels, metrics = comparison.labels(), [name for table in comparison.tables.values()
                                            for name in table["metrics"]]
    for model in (published or {}).get("models", []):
        assert model in labels
    for setting, rows in (published or {}).get("values", {}).items():
        assert set(rows) <= set(metrics), setting
        assert all(isinstance(value, (int, float)) and math.isfinite(value) and value > 0
                   for row in rows.values() for value in row)


def test_diffcdr_recipes_cover_its_tables():
    assert {path.stem for path in PAPER} >= {"diffcdr_table2", "diffcdr_table3", "diffcdr_table4",
                                             "diffcdr_figure3", "diffcdr_figure4", "diffcdr_grids"}
    published = Comparison.read("paper/diffcdr_table2.yaml").published
    # Spot checks against the paper's page: first row, last row, and best of the second task.
    assert published["values"]["task1 β=20%"]["rating.mae"][0] == 4.4546
    assert published["values"]["task3 β=80%"]["ranking_full.hit@20"][-1] == 0.00179
    assert published["values"]["task2 β=50%"]["rating.rmse"][4] == 1.3051


@pytest.mark.parametrize("path", sorted((properties_path() / "dataset").glob("*.yaml")),
                         ids=lambda path: path.name)
def test_pairs_name_two_domains(path):
    assert set(read_yaml(path)) >= {"source_domain", "target_domain"}


def test_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("properties/diffcdr.yaml", "diffcdr.yaml"):
        assert Path(find_config_file(name)).samefile(properties_path() / "diffcdr.yaml")
