"""MMDCDR: its ablations, the form of the paper, the ways to split, and what it refuses."""

import numpy as np
import pytest
import torch
from contract import ModelContract
from mmdcdr_by_hand import SMALL
from running import run_keys, write_item_features

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.features import write_features
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.errors import ConfigError, DataError

SHORT = {**SMALL, "pretrain_epochs": 1, "diffusion_epochs": 1, "epochs": 1, "train_batch_size": 16,
         "diffusion_batch_size": 16}


@pytest.fixture(scope="module")
def short(tiny_config, content, tmp_path_factory):
    """``short(**keys)``: a run of one epoch a stage on three modalities."""

    def make(**keys):
        keys = {**SHORT, "data_path": content(), **keys}
        return run_keys(tiny_config("MMDCDR", **keys), tmp_path_factory.mktemp("short") / "run")

    return make


# ---- ablations of section IV-C ------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "names"), [
    ({}, ["audio", "image", "text", "id"]),                                 # All that both domains have.
    ({"modalities": [], "use_ids": True}, ["id"]),                          # w/o mm
    ({"modalities": ["image"], "use_ids": False}, ["image"]),               # w/o text
    ({"modalities": ["text"], "use_ids": False}, ["text"])], ids=str)       # w/o image
def test_modalities(keys, names, built_mmdcdr):
    model, _, _ = built_mmdcdr(**{"modalities": None, **keys})
    domain, ids = model.domains["target"], "id" in names
    assert model.names == names == list(domain.item_sizes)
    assert len(model.denoisers) == len(model.alignments) == len(model.item_layers) == len(names)
    assert (domain.factorization is not None) == ids
    assert [stage.name for stage in model.stages()] == [*["source", "target"] * ids, "diffusion", "rating"]


def test_modalities_of_one_domain_alone_are_left_out(make_tiny_pair, tiny_config, tmp_path):
    pair = make_tiny_pair(tmp_path)
    write_item_features(pair)
    (tmp_path / "src" / "src.image.json").unlink()
    made = run_keys(tiny_config("MMDCDR", **SHORT, data_path=tmp_path, state="INFO"), tmp_path / "run")
    assert made.model.names == ["text", "id"]
    assert "modalities: ['text'] are in both domains" in (tmp_path / "run" / "train.log").read_text()


def test_without_contrastive_loss_the_rating_error_is_left(built_mmdcdr):
    """w/o cl; and with a single modality there is nothing to contrast."""
    def loss_of(**keys):
        model, config, train = built_mmdcdr(**keys)
        loader = stage_loader(config, train, "overlap_ratings", 12, seed=5, by_user=True)
        return model.rating_loss(next(iter(loader))).item()

    assert loss_of(contrastive_weight=0.2) > loss_of() + 0.01
    one = {"modalities": ["text"], "use_ids": False}
    assert loss_of(**one, contrastive_weight=0.2) == loss_of(**one)


def test_without_diffusion_there_is_no_noise_network(built_mmdcdr):
    """w/o diff: a perceptron of as many layers; nothing is drawn."""
    with_it, _, _ = built_mmdcdr(num_layers=3)
    model, _, _ = built_mmdcdr(use_diffusion=False, num_layers=3, sampling_noise=True)
    for mapping, network in zip(model.denoisers, with_it.denoisers, strict=True):
        linear = [layer for layer in mapping if isinstance(layer, torch.nn.Linear)]
        assert len(linear) == len(network.layers)
        assert not any("time" in name for name, _ in mapping.named_parameters())
    users = torch.arange(1, 30)
    before = model.target_profiles(0, users, learning=True)[0]
    model.epoch, model.seed = 7, 8
    assert torch.equal(model.target_profiles(0, users, learning=True)[0], before)


# ---- the form of the paper ----------------------------------------------------------------------


def test_values_of_section_four():
    config = Config("MMDCDR", "ml100k-pair", overrides={"paper": True})
    stated = {"feature_size": 256, "embedding_size": 256, "num_layers": 3, "hidden_size": 512,
              "condition_drop_probability": 0.1, "contrastive_weight": 0.2, "temperature": 0.02,
              "num_evaluations": 50, "epochs": 30, "rating_users": "overlapping",
              "sampling_noise": True, "num_samples": 1, "align_weight": 0.0}
    assert {key: config[key] for key in stated} == stated
    assert config["num_steps"] in (1000, 3000, 5000, 7000)
    rates = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.1)
    assert config["learning_rate"] in rates and config["diffusion_learning_rate"] in rates
    ours = ("use_ids", "biases", "profile_statistics", "standardize", "residual")
    assert not any(config[key] for key in ours)


def test_the_form_of_the_paper_trains(short):
    made = short(paper=True, modalities=["text", "image"], num_evaluations=50)
    model = made.model
    assert model.names == ["text", "image"] and model.sampling_noise and not model.head.biases
    assert [entry["stage"] for entry in made.metrics["history"]] == ["diffusion", "rating"]
    users, items = torch.arange(1, 30), torch.arange(1, 20)
    scores = ModelContract.scores(made)[users][:, items]
    torch.testing.assert_close(scores, model.user_vectors(users) @ model.item_vectors(items).T,
                               rtol=1e-4, atol=1e-4)
    assert torch.isfinite(scores).all()


# ---- other ways to train and to split -----------------------------------------------------------


@pytest.mark.parametrize("keys", [
    {"train_neg_ratio": 1}, {"split_protocol": "warm_start", "finetune_epochs": 2},
    {"split_protocol": "ratio"}, {"split_protocol": "cold_start_items"}, {"rating_users": "all_target"},
    {"modality_policy": "mean"}, {"num_steps": 5}], ids=str)
def test_it_runs(keys, short):
    made = short(contrastive_weight=0.1, **keys)
    assert torch.isfinite(ModelContract.scores(made)).all()
    assert np.isfinite(made.metrics["test"]["rating"]["rmse"])
    stages = [entry["stage"] for entry in made.metrics["history"]]
    assert stages[:4] == ["source", "target", "diffusion", "rating"]
    assert stages[4:] == ["finetune"] * keys.get("finetune_epochs", 0)


def test_negatives_reach_the_rating_stage(short):
    """Rows of rating 0 pull the scores down."""
    means = [ModelContract.scores(short(train_neg_ratio=ratio, epochs=5, learning_rate=0.01)).mean()
             for ratio in (0, 3)]
    assert means[1] < means[0] - 0.5


@pytest.mark.slow
def test_compiled_networks(short):
    """In training and in sampling, with the same numbers up to rounding."""
    keys = {"guidance_scale": 2.0, "modalities": ["text"], "use_ids": False}
    eager = short(**keys)
    try:
        compiled = short(**keys, compile_networks=True)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"no compiler works here: {error}")
    assert all(network._compiled_call_impl is not None for network in compiled.model.denoisers)
    torch.testing.assert_close(ModelContract.scores(compiled), ModelContract.scores(eager),
                               rtol=1e-3, atol=1e-3)


# ---- what is refused ----------------------------------------------------------------------------


def test_nothing_to_make_profiles_of(tiny_config, tmp_path):
    for modalities in ([], None):
        keys = {**SHORT, "modalities": modalities, "use_ids": False}
        with pytest.raises(ConfigError, match=r"modalities: MMDCDR needs a modality .* both domains.*"
                                              r"prepare encode makes some.*use_ids: True"):
            run_keys(tiny_config("MMDCDR", **keys), tmp_path / "run")


def test_an_unknown_modality(short):
    with pytest.raises(DataError, match=r"'smell' of 'tgt' lacks tgt.smell.npy.*finished here: audio, "
                                        r"image, text.*make it with"):
        short(modalities=["text", "smell"])


def test_a_modality_of_other_dimensions_in_the_other_domain(make_tiny_pair, tiny_config, tmp_path):
    pair = make_tiny_pair(tmp_path)
    write_item_features(pair)
    tokens = sorted({row[1] for row in pair.source_rows})
    write_features(tmp_path / "src", "src", "text", tokens, np.ones((len(tokens), 7), np.float32),
                   encoder="test")
    with pytest.raises(ConfigError, match=r"modalities: 'text' has 7 dimensions in the source and 5 in the "
                                          r"target; encode both domains alike"):
        run_keys(tiny_config("MMDCDR", **SHORT, data_path=tmp_path), tmp_path / "run")


def test_one_overlapping_user(short):
    with pytest.raises(DataError, match=r"MMDCDR .*overlapping training users, but there are 1; "
                                        r"lower test_user_ratio, or raise overlap_ratio"):
        short(overlap_ratio=0.05, valid_user_ratio=0.5)


@pytest.mark.parametrize(("key", "value", "accepted"), [
    ("rating_users", "some", "overlapping.*all_target"), ("id_profile", "all", "vector.*mean.*both"),
    ("condition_drop_probability", 1.5, "0 to 1"), ("temperature", 0.0, "above 0"),
    ("num_evaluations", 0, "at least 1"), ("num_samples", 0, "1 or more"),
    ("hidden_activation", "sine", "relu.*silu")])
def test_values_that_are_refused(key, value, accepted, built_mmdcdr):
    """The message names the key, the value and what is accepted."""
    with pytest.raises(ValueError, match=f"{key}.*{value}.*{accepted}"):
        built_mmdcdr(**{key: value})
