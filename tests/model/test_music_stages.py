"""What each stage of MuSiC iterates, changes and leaves."""

import pytest
import torch
from running import run_keys

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.trainer import StagedTrainer

KEYS = {"pretrain_epochs": 1, "pretrain_batch_size": 256, "feature_epochs": 1, "side_epochs": 1, "epochs": 1,
        "modalities": ["text"], "hidden_size": 8, "id_embedding_size": 3, "eval_step": 0}
BASES = "domains.source.factorization", "domains.target.factorization"
PROFILES = {f"domains.{domain}.{what}" for domain in ("source", "target") for what in ("center", "scale")}
TARGET, SOURCE = "user_extractors.0", "user_extractors.1"
ITEMS, HEAD, UNET = "item_extractor", "head", "denoiser"


@pytest.fixture
def changes(tiny_config, content, tmp_path, monkeypatch):
    """``changes(**keys)``: (stage, what it changed) of a run, in order; the parts of a name that are
    listed above stand for all that begins with them."""

    def make(**keys):
        seen, run_stage = [], StagedTrainer._run_stage

        def watched(trainer, number, stage, state):
            before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
            run_stage(trainer, number, stage, state)
            moved = {name for name, value in trainer.model.state_dict().items()
                     if not torch.equal(value, before[name])}
            groups = {group for group in (*BASES, *PROFILES, SOURCE, TARGET, ITEMS, HEAD, UNET)
                      if any(name.startswith(group) for name in moved)}
            assert all(name.startswith(tuple(groups)) for name in moved)
            seen.append((stage.name, groups))

        monkeypatch.setattr(StagedTrainer, "_run_stage", watched)
        run_keys(tiny_config("MuSiC", data_path=content(), **{**KEYS, **keys}), tmp_path / "run")
        return seen

    return make


FACTORISATIONS = [("source", {BASES[0]}), ("target", {BASES[1]})]


@pytest.mark.parametrize(("keys", "expected"), [
    ({}, [*FACTORISATIONS, ("features", {TARGET, ITEMS, HEAD, *PROFILES}), ("side", {UNET}),
          ("transfer", {SOURCE, ITEMS, HEAD, UNET})]),
    ({"rating_users": "all_target"}, [
        *FACTORISATIONS, ("features", {TARGET, ITEMS, HEAD, *PROFILES}), ("side", {UNET}),
        ("transfer", {SOURCE, TARGET, ITEMS, HEAD, UNET})]),
    ({"use_ids": False, "standardize": False, "biases": False, "shared_user_extractor": True}, [
        ("features", {TARGET, ITEMS}), ("side", {UNET}), ("transfer", {TARGET, ITEMS, UNET})]),
    ({"joint": True}, [*FACTORISATIONS, ("features", {TARGET, ITEMS, HEAD, *PROFILES}),
                       ("transfer", {SOURCE, ITEMS, HEAD, UNET})]),
    ({"use_side_users": False}, [*FACTORISATIONS, ("features", {TARGET, ITEMS, HEAD, *PROFILES}),
                                 ("transfer", {SOURCE, ITEMS, HEAD, UNET})]),
    ({"use_diffusion": False, "joint": True}, [
        *FACTORISATIONS, ("features", {TARGET, ITEMS, HEAD, *PROFILES}),
        ("transfer", {SOURCE, ITEMS, HEAD})]),
], ids=lambda value: str(value) if isinstance(value, dict) else "stages")
def test_what_a_stage_changes(keys, expected, changes):
    """The target's perceptron is not moved by the diffusion, which has x_0 from it: only ratings of users
    who are not transferred move it, and a shared one as that of the source."""
    assert changes(**keys) == expected


@pytest.fixture
def declared(tiny_config, content):
    """``declared(**keys)``: stage -> the users of its rows, as tokens; and the training users."""

    def make(**keys):
        config = Config(config_dict=tiny_config("MuSiC", data_path=content(), **{**KEYS, **keys}))
        train = prepare_parts(config).train
        found = {}
        for stage in config.model_class(config, train).stages():
            loader = stage_loader(config, train, stage.data, stage.batch_size or 16, 5, stage.by_user)
            users = torch.unique(torch.cat([batch["user_id"] for batch in loader]))
            domain = train.source if stage.data == "source" else train
            found[stage.name] = set(domain.field2id_token["user_id"][users].tolist())
        return found, set(train.field2id_token["user_id"][train.users_with_rows()].tolist())

    return make


@pytest.mark.parametrize("keys", [{}, {"joint": True}, {"rating_users": "all_target"},
                                  {"joint": True, "use_side_users": False}], ids=str)
def test_whom_a_stage_learns_from(keys, declared, tiny_pair):
    """Side users are those of the target alone; nobody is held out of training and learned from."""
    found, trained = declared(**keys)
    overlap, side = trained & set(tiny_pair.overlap), set(tiny_pair.target_only)
    assert side < trained and len(overlap) < len(tiny_pair.overlap)
    assert found["source"] == set(tiny_pair.overlap) | set(tiny_pair.source_only)
    assert found["target"] == found["features"] == trained
    together = keys.get("joint") and keys.get("use_side_users", True)
    assert ("side" in found) == (not keys.get("joint"))
    assert found.get("side", side) == side
    assert found["transfer"] == (trained if together or "rating_users" in keys else overlap)


def test_ratings_of_side_users_do_not_count_in_the_joint_form(tiny_config, content):
    """Unless ``rating_users: all_target`` says so."""
    def loss(change, **keys):
        keys = {**KEYS, "joint": True, **keys}
        config = Config(config_dict=tiny_config("MuSiC", data_path=content(), **keys))
        train = prepare_parts(config).train
        torch.manual_seed(1)
        model = config.model_class(config, train).train()
        batch = next(iter(stage_loader(config, train, "target", 40, 5, by_user=True)))
        batch["rating"][~model.in_source[batch["user_id"]]] += change
        return model.joint_loss(batch).item()

    assert loss(1.0) == loss(0.0)
    assert loss(1.0, rating_users="all_target") != loss(0.0, rating_users="all_target")
