"""``paper: True``: the values, the layer they are of, and the files they come from."""

import re

import pytest

from recbole_mmdiff.compare.cells import cell_config
from recbole_mmdiff.compare.plan import Comparison
from recbole_mmdiff.config import Config, configurator, defaults, properties_path
from recbole_mmdiff.config.keys import check_known, model_keys, recbole_keys
from recbole_mmdiff.config.sources import read_yaml
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.registry import MODELS, get_model

PAIR = "ml100k-pair"
FILES = sorted((properties_path() / "plain").glob("*.yaml"))
FORMS = [path.stem for path in FILES if path.stem in MODELS]
BASE = {"embedding_size": 10, "biases": False, "init_std": 1.0, "reg_weight": 0.0}
MAPPING = {**BASE, "standardize": False, "pretrain_epochs": 10, "pretrain_batch_size": 512,
           "pretrain_learning_rate": 0.01, "epochs": 10}
#: section 4.1 of DiffCDR's paper, and its authors' code
VALUES = {
    "CMF": {**BASE, "untrained_users": "start", "epochs": 10, "learning_rate": 0.01, "train_batch_size": 512},
    "DiffCDR": {**MAPPING, "learning_rate": 0.001, "guidance_scale": 0.1, "task_weight": 0.1},
}


def values(config, keys):
    return {key: config[key] for key in keys}


@pytest.mark.parametrize("model", VALUES)
@pytest.mark.parametrize("place", ["file", "config_dict", "command line"])
def test_the_values_of_the_paper_wherever_the_key_is_set(tmp_path, model, place):
    (tmp_path / "mine.yaml").write_text("paper: True\n")
    given = {"file": {"config_file_list": [tmp_path / "mine.yaml"]},
             "config_dict": {"config_dict": {"paper": "True"}},
             "command line": {"overrides": {"paper": True}}}[place]
    config, tuned = Config(model, PAIR, **given), Config(model, PAIR)
    assert values(config, VALUES[model]) == VALUES[model]
    assert set(config.origin) == {"paper"}
    others = config.final_config_dict.keys() - VALUES[model].keys() - {"paper"}
    assert values(config, others) == values(tuned, others)
    assert (config["paper"], tuned["paper"], tuned["embedding_size"]) == (True, False, 16)


def test_every_key_that_is_set_wins(tmp_path):
    (tmp_path / "mine.yaml").write_text("learning_rate: 0.5\nepochs: 3\n")
    config = Config("DiffCDR", PAIR, [tmp_path / "mine.yaml"], {"task_weight": 2.0},
                    {"paper": True, "epochs": 4})
    assert values(config, ["learning_rate", "task_weight", "epochs", "guidance_scale"]) \
        == {"learning_rate": 0.5, "task_weight": 2.0, "epochs": 4, "guidance_scale": 0.1}


def test_the_models_of_a_comparison(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("models: {tuned: {model: DiffCDR}, paper: {model: DiffCDR, paper: True}}\n"
                    "settings: {a: {dataset: ml100k-pair}}\ntables: {t: {metrics: [rating.mae]}}\n")
    configs = {cell.model: cell_config(cell.keys, cell.files, {}) for cell in Comparison.read(path).cells()}
    assert values(configs["paper"], VALUES["DiffCDR"]) == VALUES["DiffCDR"]
    assert configs["tuned"]["task_weight"] == 1.0


def test_a_saved_run_keeps_its_values_when_the_form_changes(tmp_path, monkeypatch):
    config = Config("DiffCDR", PAIR, config_dict={"paper": True, "epochs": 7})
    config.save(tmp_path / "config.yaml")
    monkeypatch.setattr(configurator, "paper_form", lambda model: {"task_weight": 5.0})
    again = Config(config_file_list=[tmp_path / "config.yaml"])
    assert again.run_dict == config.run_dict and again["paper"] is True


@pytest.mark.parametrize("model", ["Bias", "BPR"])
def test_a_model_without_a_form_is_told_which_have_one(model):
    with pytest.raises(ConfigError, match=f"paper: True: .* of {model}, only of .*'MF'.*'DiffCDR'"):
        Config(model, PAIR, config_dict={"paper": True})
    assert Config(model, PAIR, config_dict={"paper": False})["paper"] is False


@pytest.mark.parametrize("given", [1, "yes it is", None, ["DiffCDR"]])
def test_the_key_is_a_truth_value(given):
    for model in ("Bias", "MF"):
        with pytest.raises(ConfigError, match="config_dict: paper: "):
            Config(model, PAIR, config_dict={"paper": given})


def test_the_models_of_the_papers_have_forms():
    assert set(FORMS) >= {"MF", "CMF", "EMCDR", "SSCDR", "LACDR", "PTUPCDR", "DiffCDR"}


@pytest.mark.parametrize("model", FORMS)
def test_a_form_sets_what_its_model_reads(model):
    """As defaults its values are never checked: a key by a wrong name would do nothing."""
    form = defaults.paper_form(model)
    check_known(form, model_keys(get_model(model)) | recbole_keys(), {}, model)
    tuned, config = Config(model, PAIR), Config(model, PAIR, overrides={"paper": True})
    assert values(config, form) == form
    assert {key: type(value) for key, value in form.items()} \
        == {key: type(tuned[key]) for key in form}, "a type that would refuse what the defaults take"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_key_of_a_form_says_where_it_comes_from(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    keys = [line for line in lines if not line.startswith("extends:")]
    assert len(lines) - len(keys) == ("extends" in read_yaml(path))
    assert all(re.match(r"\w+: .*\S +# \S", line) for line in keys), keys


def test_files_lie_above_those_that_they_extend(tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "properties_path", lambda: tmp_path)
    (tmp_path / "plain").mkdir()
    for name, text in {"low": "a: 1\nb: 1\nc: 1\nd: {x: 1, y: 1}", "high": "b: 2\nc: 2\nd: {x: 2}",
                       "MF": "extends: [low, high]\nc: 3", "CMF": "extends: [MF]\na: 4",
                       "EMCDR": "extends: [lo]"}.items():
        (tmp_path / "plain" / f"{name}.yaml").write_text(text)
    assert defaults.paper_form("MF") == {"a": 1, "b": 2, "c": 3, "d": {"x": 2, "y": 1}}
    assert defaults.paper_form("CMF") == {"a": 4, "b": 2, "c": 3, "d": {"x": 2, "y": 1}}
    with pytest.raises(ConfigError, match=r"plain/lo\.yaml: cannot be read"):
        defaults.paper_form("EMCDR")
    with pytest.raises(ConfigError, match=r"of DiffCDR, only of \['MF', 'CMF', 'EMCDR'\]"):
        defaults.paper_form("DiffCDR")
