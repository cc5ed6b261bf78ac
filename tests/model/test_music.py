"""MuSiC: the contract with ids and modalities, users' own features, the paper's form, refused values."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
from contract import ModelContract
from running import assert_same_weights, item_mean_rmse, run_keys, write_item_features

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.features import write_features
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.errors import ConfigError, DataError

SHORT = {"pretrain_epochs": 2, "pretrain_batch_size": 256, "feature_epochs": 1, "side_epochs": 2,
         "hidden_size": 16, "id_embedding_size": 4}
ACCURATE = {"pretrain_epochs": 40, "pretrain_learning_rate": 0.01, "reg_weight": 0.02,
            "feature_epochs": 20, "side_epochs": 20, "embedding_size": 8, "hidden_size": 32, "epochs": 40,
            "train_batch_size": 16, "learning_rate": 0.003, "stopping_step": 10, "valid_metric": "RMSE"}


class TestMuSiC(ModelContract):
    """Ids alone, as in the ablation w/o MLLM."""

    model = "MuSiC"
    keys = {"modalities": [], "use_ids": True, **SHORT}
    accurate_keys = ACCURATE
    best_rmse_ratio = 0.85


class TestMuSiCWithOneModality(TestMuSiC):
    """Texts."""

    more = {"modalities": ["text"], "use_ids": False}
    missing = ""

    @pytest.fixture(scope="class", autouse=True)
    def features(self, content):
        type(self).keys = {**SHORT, "data_path": content(self.missing), **self.more}


class TestMuSiCWithTwoModalities(TestMuSiCWithOneModality):
    """Texts and images; the mean of some samples, and everything in one stage."""

    more = {"modalities": ["text", "image"], "use_ids": False, "sampling_noise": True, "num_samples": 4,
            "joint": True}


class TestMuSiCWithThreeModalities(TestMuSiCWithOneModality):
    """Texts, images and a third: all that both domains have; one perceptron for all users."""

    more = {"modalities": None, "use_ids": False, "shared_user_extractor": True}


class TestMuSiCWithModalitiesAndIds(TestMuSiCWithOneModality):
    """Three modalities and ids."""

    more = {"modalities": ["text", "image", "audio"], "use_ids": True}


class TestMuSiCWithoutHalfOfTheTargetImages(TestMuSiCWithOneModality):
    """Every second item of the target has no image."""

    more = {"modalities": ["text", "image"], "use_ids": False}
    missing = "t"


@pytest.fixture(scope="module")
def short(tiny_config, content, tmp_path_factory):
    """``short(**keys)``: a short run with texts and ids."""

    def make(**keys):
        keys = {**SHORT, "modalities": ["text"], "data_path": content(), **keys}
        return run_keys(tiny_config("MuSiC", **keys), tmp_path_factory.mktemp("MuSiC") / "run")

    return make


# ---- users' own features -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def reviewed(make_tiny_pair, tiny_config, tmp_path_factory):
    """``reviewed(**manifest)``: the folder of a pair whose users tell in reviews what looks they like, of
    another size in each domain; the target's have those words in the manifest. And its split."""
    pair = make_tiny_pair(tmp_path_factory.mktemp("reviewed"), choosy=True)
    write_item_features(pair, [("text", 5)], signal=4.0)
    parts = prepare_parts(Config(config_dict=tiny_config("Bias", data_path=pair.folder)))

    def make(**manifest):
        draw = np.random.default_rng(4)
        domains = ("src", pair.source_rows, 6, {}), ("tgt", pair.target_rows, 5, manifest)
        for name, rows, dim, told in domains:
            users = sorted({row[0] for row in rows})
            tastes = np.stack([sum((float(rating) - 3) * pair.looks[item] for user, item, rating, _ in rows
                                   if user == one) for one in users])
            matrix = np.tanh(tastes) @ draw.normal(size=(3, dim)) + 0.2 * draw.normal(size=(len(users), dim))
            write_features(pair.folder / name, name, "review", users, matrix.astype(np.float32),
                           encoder="test", entity="user", fields=["review"], **told)
        return pair.folder

    return make, parts.train.saved_split.digest()


def test_users_are_described_by_their_reviews(reviewed, tiny_config, tmp_path, caplog):
    make, digest = reviewed
    keys = {**SHORT, **ACCURATE, "data_path": make(split_digest=digest), "modalities": ["text"],
            "use_ids": False, "user_modalities": ["review"], "profile_statistics": False}
    with caplog.at_level(logging.INFO):
        made = run_keys(tiny_config("MuSiC", **keys, state="INFO"), tmp_path / "run")
    assert "profiles of users: their own features ['review']" in caplog.text
    assert [extractor.hidden.in_features for extractor in made.model.user_extractors] == [5, 6]
    scores = ModelContract.scores(made)
    assert torch.isfinite(scores).all()
    assert scores[ModelContract.cold_users(made.parts)].std(0)[1:].mean() > 0.02
    assert made.metrics["test"]["rating"]["rmse"] < item_mean_rmse(made.parts)


def test_reviews_of_another_split_are_refused(reviewed, tiny_config, tmp_path):
    keys = {**SHORT, "data_path": reviewed[0](split_digest="0" * 64), "modalities": ["text"],
            "user_modalities": ["review"]}
    with pytest.raises(DataError, match=r"tgt.review.npy: was made of reviews with another split"):
        run_keys(tiny_config("MuSiC", **keys), tmp_path / "run")


def test_one_perceptron_needs_profiles_of_one_size(reviewed, tiny_config, tmp_path):
    make, digest = reviewed
    keys = {**SHORT, "data_path": make(split_digest=digest), "modalities": ["text"], "use_ids": False,
            "user_modalities": ["review"], "profile_statistics": False, "shared_user_extractor": True}
    with pytest.raises(ConfigError, match=r"shared_user_extractor: True needs .* 5 columns in the target and "
                                          r"6 in the source; encode both domains alike, or set it to False"):
        run_keys(tiny_config("MuSiC", **keys), tmp_path / "run")


# ---- the paper's form --------------------------------------------------------------------------


def test_values_of_section_four():
    """Section 4.1.4, and Eq. 8: a bare inner product."""
    config = Config("MuSiC", "ml100k-pair", overrides={"paper": True})
    stated = {"embedding_size": 32, "hidden_size": 128, "beta_start": 1e-4, "beta_end": 0.02,
              "rescale_schedule": False, "activation": "tanh", "feature_size": 0, "joint": False,
              "sampling_noise": True, "num_samples": 1, "rating_users": "overlapping", "unet_sizes": [16, 8]}
    assert {key: config[key] for key in stated} == stated
    assert config["num_steps"] in (2, 5, 10, 20, 50)
    assert config["dropout_prob"] in (0.1, 0.2, 0.3, 0.4, 0.5)
    assert config["diffusion_weight"] in (0.2, 0.3, 0.4, 0.5, 0.6)
    assert config["learning_rate"] in (1e-5, 1e-4, 1e-3) and 50 <= config["epochs"] <= 100
    assert config["use_diffusion"] and config["use_side_users"] and config["shared_user_extractor"]
    assert not any(config[key] for key in ("use_ids", "biases", "profile_statistics", "standardize"))


def test_the_form_of_the_paper_trains(short):
    made = short(paper=True, modalities=["text", "image"], epochs=2)
    assert [entry["stage"] for entry in made.metrics["history"]] == [
        "features", "side", "side", "transfer", "transfer"]
    users, items = torch.arange(1, 30), torch.arange(1, 20)
    ratings = made.model.user_vectors(users) @ made.model.item_vectors(items).T
    torch.testing.assert_close(ModelContract.scores(made)[users][:, items], ratings, rtol=1e-4, atol=1e-4)


def test_without_modalities_the_paper_has_the_vectors_of_the_baselines(short):
    """w/o MLLM: those of DiffCDR's factorisations of length 10."""
    made = short(paper=True, modalities=[], use_ids=True, id_embedding_size=10, epochs=1)
    target = made.model.domains["target"]
    assert target.item_sizes == {"id": 10} and target.profile_sizes == {"id": 10}
    found, has = target.profiles("id", torch.arange(made.model.n_users))
    vectors = target.factorization.user_embedding.weight
    torch.testing.assert_close(found, vectors * has[:, None])


# ---- other ways to train and to split ----------------------------------------------------------


@pytest.mark.parametrize("keys", [
    {"train_neg_ratio": 1}, {"split_protocol": "warm_start", "finetune_epochs": 2},
    {"split_protocol": "ratio"}, {"split_protocol": "cold_start_items", "cold_item_rate": 0.3},
    {"rating_users": "all_target"}, {"modality_policy": "mean"}, {"rating_vector": "one_step"},
    {"activation": "relu"}, {"activation": "softmax"}, {"joint": True, "train_neg_ratio": 1}], ids=str)
def test_it_runs(keys, short):
    made = short(**keys)
    assert torch.isfinite(ModelContract.scores(made)).all()
    assert np.isfinite(made.metrics["test"]["rating"]["rmse"])
    stages = [entry["stage"] for entry in made.metrics["history"]]
    expected = ["source"] * 2 + ["target"] * 2 + ["features"] + ["side"] * 2 * ("joint" not in keys)
    assert stages == expected + ["transfer"] * 2 + ["finetune"] * keys.get("finetune_epochs", 0)


def test_a_target_without_side_users(make_tiny_pair, atomic, tiny_config, tmp_path, caplog):
    """The log says so, and training is that without them, also in one stage."""
    pair = make_tiny_pair(tmp_path)
    atomic.write(tmp_path, "tgt", [row for row in pair.target_rows if row[0] in set(pair.overlap)])
    made = partial(tiny_config, "MuSiC", data_path=tmp_path, modalities=[], state="INFO", **SHORT)
    with caplog.at_level(logging.INFO):
        runs = [run_keys(made(**keys), tmp_path / str(number)) for number, keys in enumerate(
            [{}, {"joint": True}, {"use_side_users": False}])]
    assert caplog.text.count("side users: there are none, so the diffusion learns from overlapping") == 2
    for run in runs[1:]:
        assert_same_weights(run.model, runs[0].model)
    assert [entry["stage"] for entry in runs[0].metrics["history"]][4:] == ["features"] + ["transfer"] * 2


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value", "accepted"), [
    ("activation", "gelu", "tanh.*relu.*softmax"), ("unet_activation", "softmax", "relu, silu, tanh"),
    ("unet_sizes", [], "at least one size"), ("time_embedding_size", 7, "even"),
    ("rating_vector", "last", "chain.*one_step"), ("rating_users", "some", "overlapping.*all_target"),
    ("id_profile", "all", "vector.*mean.*both"), ("dropout_prob", 1.0, "up to, but not including, 1"),
    ("diffusion_weight", 1.5, "0 to 1"), ("cold_item_rate", -0.5, "0 to 1"), ("num_steps", 0, "at least 1"),
    ("num_samples", 0, "1 or more"), ("sampling_batch_size", 0, "1 or more"),
    ("side_batch_size", 0, "1 or more"), ("embedding_size", 0, "1 or more"),
    ("feature_size", -1, "0 or more"), ("modalities", "text", r"no list of names, .* \[text"),
    ("modalities", [5], "no list of names"), ("num_samples", 3, "sampling_noise: True"),
    ("modalities", ["id"], "another name"), ("user_modalities", ["id"], "another name")])
def test_values_that_are_refused(key, value, accepted, tiny_config):
    """The message names the key, the value and what to do."""
    config = Config(config_dict=tiny_config("MuSiC", **{"modalities": [], key: value}))
    train = prepare_parts(config).train
    value = {"[]": r"\(\)", "['id']": "'id'"}.get(str(value), str(value))
    with pytest.raises(ConfigError, match=f"{key}.*{value}.*{accepted}"):
        config.model_class(config, train)
