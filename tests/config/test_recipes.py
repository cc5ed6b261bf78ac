"""Every recipe and every properties file builds a configuration, and its keys are read by its models."""

from pathlib import Path

import pytest

from recbole_mmdiff.config import Config, find_config_file, properties_path
from recbole_mmdiff.config.sources import read_yaml
from recbole_mmdiff.model import MODELS

RUNS = sorted(properties_path().glob("*.yaml"))
RUN_RECIPES = [path for path in RUNS if "model" in read_yaml(path)]
PAPER = {"diffcdr.yaml": ("MF", "CMF", "EMCDR", "DiffCDR"), "diffcdr_mf.yaml": ("MF", "CMF"),
         "diffcdr_mapping.yaml": ("EMCDR", "DiffCDR"), "diffcdr_diffusion.yaml": ("DiffCDR",)}


@pytest.mark.parametrize("path", RUN_RECIPES, ids=lambda path: path.name)
def test_run_recipes_name_a_model_and_data(path):
    config = Config(config_file_list=[path])
    assert config["model"] in MODELS and config.cross_domain


def test_every_paper_recipe_is_known_here():
    assert {path.name for path in (properties_path() / "paper").glob("*.yaml")} == set(PAPER)


@pytest.mark.parametrize(("name", "model"), [(n, m) for n, ms in PAPER.items() for m in ms])
def test_paper_recipes_fit_their_models(name, model):
    content = read_yaml(properties_path() / "paper" / name)
    config = Config(model=model, config_file_list=[properties_path() / "paper" / name])
    assert {key: config[key] for key in content} == content


@pytest.mark.parametrize("path", sorted((properties_path() / "dataset").glob("*.yaml")),
                         ids=lambda path: path.name)
def test_pairs_name_two_domains(path):
    assert set(read_yaml(path)) >= {"source_domain", "target_domain"}


def test_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("properties/diffcdr.yaml", "diffcdr.yaml"):
        assert Path(find_config_file(name)).samefile(properties_path() / "diffcdr.yaml")
