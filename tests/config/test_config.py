"""The configuration: layers, origins, checks, and RecBole's own keys."""

import sys
from pathlib import Path

import pytest
import yaml

from recbole_mmdiff.config import Config, parse_overrides
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.registry import MODELS, get_model

PAIR = {"source_domain": {"dataset": "s"}, "target_domain": {"dataset": "t"}}


def pair(model="MF", *words, files=(), **keys):
    return Config(model, None, list(files), {**PAIR, **keys}, parse_overrides(list(words)))


@pytest.fixture
def file(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


# ---- layers -------------------------------------------------------------------------------------


def test_the_layers_from_lowest_to_highest(file):
    """RecBole < overall < cross_domain < model < files < config_dict < command line."""
    bpr, own = Config("BPR", "tgt"), pair()
    assert (bpr["seed"], bpr["valid_metric"], bpr["split_protocol"]) == (2020, "MRR@10", "ratio")
    assert pair("BPR")["split_protocol"] == "cold_start_users"
    assert pair("BPR")["valid_metric"] == "NDCG@20"
    assert own["valid_metric"] == "RMSE" and own["learning_rate"] == 0.002
    low = file("low.yaml", "learning_rate: 0.1\nepochs: 7\nseed: 1\nreg_weight: 0.5\n")
    high = file("high.yaml", "epochs: 8\nseed: 2\nreg_weight: 0.25\n")
    config = pair("MF", "--seed=4", files=[low, high], seed=3, reg_weight=0.125)
    assert [config[key] for key in ("learning_rate", "epochs", "reg_weight", "seed",
                                    "embedding_size")] == [0.1, 8, 0.125, 4, 16]
    origin = {key: config.origin[key] for key in ("learning_rate", "epochs", "reg_weight", "seed")}
    assert origin == {"learning_rate": low, "epochs": high, "reg_weight": "config_dict",
                      "seed": "command line"}
    assert "embedding_size" not in config.origin
    assert "seed = 4   (command line)" in config.changes()


def test_nested_keys_merge_over_all_layers(file):
    low = file("low.yaml", "source_domain: {dataset: a, val_interval: {rating: '[3,inf)'}}\n"
                           "target_domain: {dataset: b}\neval_args: {order: TO}\n")
    config = Config("BPR", None, [low], {"target_domain": {"data_path": "/x"}}, parse_overrides(
        ["--source_domain.dataset=c", "--eval_args.mode=full", "--eval_args.group_by=none"]))
    assert config["source_domain"] == {"dataset": "c", "val_interval": {"rating": "[3,inf)"}}
    assert config["target_domain"] == {"dataset": "b", "data_path": "/x"}
    assert config["dataset"] == "c-b"
    assert config["eval_args"]["order"] == "TO" and config["eval_args"]["group_by"] == "none"
    assert config["eval_args"]["mode"] == {"valid": "full", "test": "full"}
    assert config["eval_args"]["split"] == {"RS": [0.8, 0.1, 0.1]}


def test_another_way_to_split_replaces_the_default():
    assert pair("BPR", "--eval_args.split={LS: valid_and_test}")["eval_args"]["split"] \
        == {"LS": "valid_and_test"}


def test_a_pair_by_name_and_what_is_laid_over_it():
    config = Config("BPR", "ml1m-pair", overrides=parse_overrides(["--target_domain.dataset=x"]))
    assert config["source_domain"] == {"dataset": "ml1m-drama"}
    assert config["target_domain"] == {"dataset": "x"}
    assert config.cross_domain and config["dataset"] == "ml1m-pair"


def test_the_default_data_are_the_embedded_pair():
    assert Config("MF")["dataset"] == "ml100k-pair"
    assert not Config("BPR", "ml-100k").cross_domain


def test_model_and_data_set_may_stand_in_a_file(file):
    path = file("run.yaml", "model: EMCDR\ndataset: ml1m-pair\n")
    config = Config(config_file_list=[path])
    assert (config["model"], config["dataset"]) == ("EMCDR", "ml1m-pair")
    assert Config("MF", config_file_list=[path])["model"] == "MF"
    assert Config(get_model("MF"), "ml1m-pair")["model"] == "MF"


def test_the_words_of_the_process_are_not_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", "--seed=99", "--epochs=1", "--model=BPR", "stray"])
    config = pair()
    assert (config["seed"], config["epochs"], config["model"]) == (2020, 60, "MF")


def test_each_domain_reads_its_own_keys(tmp_path):
    config = pair("BPR", data_path=str(tmp_path), source_domain={
        "dataset": "s", "data_path": "/elsewhere", "load_col": {"inter": ["user_id", "item_id"]}})
    source, target = config.for_domain("source_domain"), config.for_domain("target_domain")
    assert source["data_path"] == "/elsewhere/s" and target["data_path"] == str(tmp_path / "t")
    assert source["load_col"] == {"inter": ["user_id", "item_id"]}
    assert "rating" in target["load_col"]["inter"] and config["dataset"] == "s-t"
    source["seed"] = 5
    assert config["seed"] == target["seed"] == 2020


# ---- values -------------------------------------------------------------------------------------


def test_whole_numbers_where_a_float_is_meant():
    config = pair("MF", "--learning_rate=1", "--reg_weight=0", "--overlap_ratio=1")
    assert (config["learning_rate"], config["reg_weight"], config["overlap_ratio"]) == (1, 0, 1)
    assert pair("MF", "--learning_rate=1e-4")["learning_rate"] == 1e-4


def test_values_stay_text_and_nothing_runs(tmp_path):
    trap = tmp_path / "ran"
    text = f'__import__("os").system("touch {trap}")'
    config = pair("BPR", f"--wandb_project={text}", checkpoint_dir=text)
    assert config["wandb_project"] == config["checkpoint_dir"] == text
    assert not trap.exists()


@pytest.mark.parametrize("given", ["yes it is", 3, [1]])
def test_a_type_that_is_not_the_defaults_names_key_value_and_origin(given):
    with pytest.raises(ConfigError, match=r"config_dict: biases: .* expected bool \(default: True\)"):
        pair(biases=given)


def test_an_unknown_key_names_its_file_and_the_nearest_known(file):
    path = file("mine.yaml", "stoping_step: 3\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: the key 'stoping_step' is unknown to MF; "
                                          r"did you mean 'stopping_step'\?"):
        pair(files=[path])


def test_a_key_of_another_model_is_unknown():
    pair("DiffCDR", "--guidance_scale=0.5")
    with pytest.raises(ConfigError, match="'guidance_scale' is unknown to MF"):
        pair("MF", "--guidance_scale=0.5")


# ---- metrics ------------------------------------------------------------------------------------


def test_a_mixture_of_metrics_is_separated():
    config = pair("MF", "--metrics=[NDCG, MAE, Hit, rmse]")
    assert config["metrics"] == ["NDCG", "Hit"] and config["rating_metrics"] == ["MAE", "rmse"]
    assert config["eval_passes"] == ["rating", "ranking_full", "ranking_labeled"]


def test_value_metrics_alone_mean_the_rating_pass():
    config = pair("MF", "--metrics=MAE")
    assert config["rating_metrics"] == ["MAE", "RMSE"], "RMSE is the validation metric"
    assert config["eval_passes"] == ["rating"]
    assert pair("MF", "--metrics=MAE", "--eval_passes=[ranking_full]")["eval_passes"] \
        == ["ranking_full"]
    assert pair("MF", "--eval_passes=rating")["eval_passes"] == ["rating"]


@pytest.mark.parametrize(("given", "found", "bigger"), [
    ("RMSE", ("rating", "rmse"), False), ("mae", ("rating", "mae"), False),
    ("NDCG@5", ("ranking_full", "ndcg@5"), True), ("AUC", ("rating", "auc"), True),
    ("rating.MAE", ("rating", "mae"), False),
    ("ranking_labeled.NDCG@10", ("ranking_labeled", "ndcg@10"), True),
    ("GAUC", ("ranking_full", "gauc"), True), ("MAP@3", ("ranking_full", "map@3"), True),
])
def test_forms_of_the_validation_metric(given, found, bigger):
    config = pair("MF", f"--valid_metric={given}")
    assert (config.valid_pass, config.valid_key) == found
    assert config["valid_metric_bigger"] is bigger
    if "@" in given:
        assert int(given.split("@")[1]) in config["topk"]
    computed = config["rating_metrics"] if config.valid_pass == "rating" else config["metrics"]
    assert config.valid_key.split("@")[0] in [name.lower() for name in computed]


@pytest.mark.parametrize("given", ["NDCG", "NDCG@", "NDCG@x", "NDCG@0", "NDCG@-1", "MAE@10", "NGCD@5",
                                   "rating.NDCG@5", "ranking_full.MAE", "ranking_labeled.Hit@5",
                                   "valid.NDCG@5", ""])
def test_forms_that_no_metric_has(given):
    with pytest.raises(ConfigError, match="valid_metric"):
        pair(valid_metric=f"'{given}'")


# ---- what RecBole has ---------------------------------------------------------------------------

BUILT_IN = ["BPR", "LightGCN", "NeuMF", "ItemKNN", "MultiVAE", "SGL", "NCL", "EASE", "DiffRec",
            "SimpleX", "RecVAE", "CDAE", "FM", "DeepFM", "xDeepFM", "DCNV2", "SASRec", "GRU4Rec",
            "BERT4Rec", "KGAT", "CKE"]


@pytest.mark.parametrize("model", BUILT_IN)
def test_every_key_of_recboles_model_files_is_accepted(model):
    """Given explicitly, one by one and together, and kept as RecBole's defaults have it."""
    import recbole

    folder = Path(recbole.__file__).parent / "properties"
    keys = yaml.safe_load((folder / "model" / f"{model}.yaml").read_text(encoding="utf-8")) or {}
    # RecBole demands it of models with cross entropy.
    more = {"train_neg_sample_args": None} if keys.get("loss_type") == "CE" else {}
    plain = Config(model, "tgt", config_dict=more)
    given = {key: plain[key] for key in keys}
    config = Config(model, "tgt", config_dict=given | more)
    assert {key: config[key] for key in keys} == given


def test_every_key_of_recboles_own_defaults_is_accepted():
    import recbole

    root = Path(recbole.__file__).parent / "properties"
    keys = {}
    for name in ("overall.yaml", "dataset/sample.yaml"):
        keys |= yaml.safe_load((root / name).read_text(encoding="utf-8"))
    assert len(keys) > 60
    config = Config("BPR", "tgt", config_dict=keys)
    for key in keys:
        assert key in config.final_config_dict


def test_every_model_of_ours_builds_with_all_its_defaults_given():
    from recbole_mmdiff.config import properties_path
    from recbole_mmdiff.config.sources import read_yaml

    for model in MODELS:
        keys = read_yaml(properties_path() / "model" / f"{model}.yaml")
        config = pair(model, **keys)
        assert all(config[key] == value for key, value in keys.items() if key != "valid_metric")


# ---- saving -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "keys"), [
    ("MF", {}), ("DiffCDR", {"hidden_sizes": [8], "learning_rate": 1e-5, "topk": 7}),
    ("BPR", {"metrics": ["NDCG", "MAE"], "valid_metric": "Hit@3", "eval_args": {"order": "TO"}}),
    ("LightGCN", {"source_domain": {"dataset": "sö", "data_path": "there"}, "split_file": "x.npz"}),
    ("PTUPCDR", {"paper": True, "learning_rate": 0.5}),
    ("CMF", {"user_link_file_path": "links.tsv", "clip_grad_norm": {"max_norm": 2}}),
])
def test_a_saved_configuration_is_the_same_run_from_any_folder(tmp_path, monkeypatch, model, keys):
    monkeypatch.chdir(tmp_path)
    config = pair(model, "--seed=12", data_path="data", **keys)
    config.save(tmp_path / "config.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = Config(config_file_list=[tmp_path / "config.yaml"])
    paths = {"data_path", "split_file", "user_link_file_path", "source_domain"}
    one, other = config.final_config_dict, again.final_config_dict
    assert set(one) == set(other)
    assert {key for key in one if one[key] != other[key]} <= paths
    assert other["data_path"].startswith(str(tmp_path / "data"))
    if "split_file" in keys:
        assert other["split_file"] == str(tmp_path / "x.npz")
        assert other["source_domain"]["data_path"] == str(tmp_path / "there")
    assert (again.valid_pass, again.valid_key) == (config.valid_pass, config.valid_key)
    again.save(tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "config.yaml").read_text()


def test_columns_have_the_same_names_in_both_domains():
    keys = {"source_domain": {"dataset": "src", "RATING_FIELD": "stars"}}
    with pytest.raises(ConfigError, match=r"source_domain: RATING_FIELD: 'stars' is not .* 'rating'"):
        Config("MF", "ml100k-pair", config_dict=keys)
    same = {**keys, "RATING_FIELD": "stars"}
    assert Config("MF", "ml100k-pair", config_dict=same)["RATING_FIELD"] == "stars"
