"""Losses, weights and scores that are no numbers: where, why, and what is kept."""

import functools
import math
import re

import numpy as np
import pytest
import torch
from running import run_keys, without_times
from torch import nn

from recbole_mmdiff import cli
from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.errors import ConfigError, TrainingError
from recbole_mmdiff.evaluator import Evaluator
from recbole_mmdiff.model.diffcdr import DiffCDR
from recbole_mmdiff.model.mf import MF
from recbole_mmdiff.model.registry import get_model
from recbole_mmdiff.quick_start import run
from recbole_mmdiff.storage import load_plain
from recbole_mmdiff.trainer.guard import CHECK_EVERY, Losses

BATCH = 100     # of about 700 rows: eight batches


@pytest.fixture
def keys(tiny_config):
    """``keys(**more)``: of a run of four epochs."""
    return lambda model="MF", **more: tiny_config(model, **{
        "epochs": 4, "train_batch_size": BATCH, "learning_rate": 0.002, "keep_data": False, **more})


@pytest.fixture
def break_loss(monkeypatch):
    """``break_loss(call, value)``: the loss of a model becomes ``value`` at its n-th batch (from 0)."""
    def install(call, value, cls=MF, name="rating_loss"):
        true, calls = getattr(cls, name), []

        @functools.wraps(true)
        def loss(model, interaction):
            calls.append(1)
            found = true(model, interaction)
            return found * value if len(calls) == call + 1 else found

        monkeypatch.setattr(cls, name, loss)
        return calls

    return install


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_it_stops_at_the_batch_and_keeps_the_last_checkpoint(keys, break_loss, tmp_path, value):
    whole = run_keys(keys(epochs=2), tmp_path / "whole")
    calls = break_loss(2 * 8 + 4, value)
    with pytest.raises(TrainingError) as error:
        run_keys(keys(), tmp_path / "run")
    assert len(calls) == 2 * 8 + 5, "no batch is trained after it"
    told, folder = str(error.value), tmp_path / "run"
    assert told.startswith(f"the training loss of stage 'ratings' is {value} in epoch 2, batch 5 of 8 (")
    assert "in the batch before); it diverged: lower learning_rate (now 0.002), or set clip_grad_norm" in told
    assert told.endswith(f". {folder / 'checkpoint.pth'} is of before and stays as it is: --resume={folder} "
                         f"--epochs=2 ends with what was learned until then")
    saved = load_plain(folder / "checkpoint.pth")
    assert saved["progress"]["epoch"] == 2
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())
    assert "TrainingError" in (folder / "train.log").read_text()
    # As the message says.
    assert cli.main([f"--resume={folder}", "--epochs=2"]) == 0
    found, expected = (load_plain(place / "checkpoint.pth")["state_dict"] for place in (folder, whole.folder))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_first_batch_of_all(keys, break_loss, tmp_path):
    break_loss(0, math.nan)
    with pytest.raises(TrainingError, match=r"is nan in epoch 0, batch 1 of 8; no step was made before, so "
                                            r"not learning_rate: look at the data, and at init_std$"):
        run_keys(keys(), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


def test_which_of_several_losses_and_which_stage(keys, break_loss, tmp_path):
    break_loss(3, math.nan, DiffCDR, "alm_loss")
    with pytest.raises(TrainingError, match=r"the training loss 2 of 2 \(alm_loss\) of stage 'transfer' is "
                                            r"nan in epoch 0, batch 4 of \d+ "):
        run_keys(keys("DiffCDR", pretrain_epochs=1), tmp_path / "run")


def test_mixed_precision_and_broken_features_are_named(keys, break_loss, tmp_path):
    break_loss(3, math.nan)
    with pytest.raises(TrainingError, match="mixed precision may not hold it: enable_amp: False; or lower"):
        run_keys(keys(enable_amp=True), tmp_path / "amp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MF, "stages", with_broken_buffer(MF.stages))
        break_loss(3, math.nan)
        with pytest.raises(TrainingError, match="its input 'looks' holds NaN: look at the features or data"):
            run_keys(keys(), tmp_path / "features")


def with_broken_buffer(stages):
    def declared(model):
        model.register_buffer("looks", torch.tensor([0.0, math.nan]))
        return stages(model)

    return declared


def test_weights_that_no_loss_shows_do_not_reach_a_checkpoint(keys, tmp_path, monkeypatch):
    """The last step of an epoch breaks them; a validation would take them for scores."""
    from recbole_mmdiff.trainer.steps import Stepper

    true, steps = Stepper.step, []

    def step(self, optimizer, *rest):
        loss = true(self, optimizer, *rest)
        steps.append(1)
        if len(steps) == 16:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0][0] = math.inf
        return loss

    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(TrainingError, match=r"the weights '.*' are not finite in epoch 1 of stage 'ratings'; "
                                            r"it diverged: .*--epochs=1 ends with"):
        run_keys(keys(), tmp_path / "run")
    assert load_plain(tmp_path / "run" / "checkpoint.pth")["progress"]["epoch"] == 1


def test_a_value_error_of_broken_weights_is_told_as_that(keys, tmp_path, monkeypatch):
    def refuse(model, interaction):
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        raise ValueError("all distances are NaN")

    monkeypatch.setattr(MF, "rating_loss", refuse)
    with pytest.raises(TrainingError, match=r"the weights .* are not finite in epoch 0"):
        run_keys(keys(), tmp_path / "run")


def test_a_value_error_of_whole_weights_stays(keys, tmp_path, monkeypatch):
    def refuse(model, interaction):
        raise ValueError("of its own")

    monkeypatch.setattr(MF, "rating_loss", refuse)
    with pytest.raises(ValueError, match=r"^of its own$"):
        run_keys(keys(), tmp_path / "run")


@pytest.mark.parametrize(("model", "more"), [
    ("BPR", {}), ("RaCT", {"train_stage": "actor_pretrain", "pretrain_epochs": 3, "save_step": 1})])
def test_models_of_recboles_loop(keys, tmp_path, monkeypatch, model, more):
    """One that our stages run, and one with a ``fit`` of its own."""
    cls = get_model(model)
    true, calls = cls.calculate_loss, []

    def loss(self, interaction):
        calls.append(1)
        return true(self, interaction) * (math.inf if len(calls) == 6 else 1)

    monkeypatch.setattr(cls, "calculate_loss", loss)
    with pytest.raises(TrainingError, match=r"the training loss is inf in epoch \d, batch \d; it diverged: "
                                            r"lower learning_rate \(now 0.002\)"):
        run_keys(keys(model, **{"train_batch_size": 20, **more}), tmp_path / "run")
    assert len(calls) == 6


def test_a_gpu_is_asked_now_and_then():
    """Which batch was the first is known all the same."""
    losses = Losses(120, 2, torch.device("cpu"))
    losses.every = CHECK_EVERY
    losses.values[60, 1] = losses.values[70, 0] = math.nan
    assert [batch for batch in range(120) if losses.first_bad(batch)] == [99, 119]
    assert losses.first_bad(99) == (60, 1) and losses.checked == 50
    short = Losses(7, 1, torch.device("cpu"))
    short.every = CHECK_EVERY
    short.values[2] = math.inf
    assert [short.first_bad(batch) for batch in range(7)] == [None] * 6 + [(2, 0)]


class Scores(nn.Module):
    """A table of scores (users, items)."""

    predicts_ratings, device = True, torch.device("cpu")

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def predict(self, interaction):
        return self.scores[interaction["user_id"], interaction["item_id"]]

    def full_sort_predict(self, interaction):
        return self.scores[interaction["user_id"]].reshape(-1).clone()


def test_nan_never_ranks_first(tiny_config, caplog):
    """For torch it is the greatest number: a model that gives nothing else would look like a good one."""
    config = Config(config_dict=tiny_config("MF", eval_passes=["ranking_full"], metrics=["NDCG", "GAUC"]))
    parts = prepare_parts(config)
    scores = torch.rand(parts.test.user_num, parts.test.item_num)
    evaluator, rows = Evaluator(config, parts), parts.valid.inter_feat
    broken, lowest = scores.clone(), scores.clone()
    broken[rows["user_id"][::2], rows["item_id"][::2]] = math.nan
    lowest[rows["user_id"][::2], rows["item_id"][::2]] = -math.inf
    assert evaluator.score(Scores(broken)) == evaluator.score(Scores(lowest))
    assert evaluator.score(Scores(broken))[0] < evaluator.score(Scores(scores))[0]
    assert evaluator.score(Scores(scores * math.nan))[0] == 0
    assert re.search(r"scores that are NaN to \d+ of \d+ users: such items rank last", caplog.text)


def test_ratings_that_are_nan_are_no_validation(tiny_config):
    config = Config(config_dict=tiny_config("MF", valid_metric="RMSE"))
    parts = prepare_parts(config)
    scores = torch.rand(parts.test.user_num, parts.test.item_num)
    rows = parts.valid.inter_feat
    scores[rows["user_id"][0], rows["item_id"][0]] = math.nan
    with pytest.raises(TrainingError, match="the model predicts ratings that are not finite"):
        Evaluator(config, parts).score(Scores(scores))


def test_a_validation_without_a_value_is_no_best_one(tiny_config, monkeypatch):
    config = Config(config_dict=tiny_config("MF", valid_metric="NDCG@10"))
    evaluator = Evaluator(config, prepare_parts(config))
    metrics = {config.valid_pass: {config.valid_key: math.nan, "recall@10": 0.5}}
    monkeypatch.setattr(evaluator, "evaluate", lambda *_: type("Found", (), {"metrics": metrics}))
    with pytest.raises(ConfigError, match=r"valid_metric: 'NDCG@10' has no value .*one of \['recall@10'\]"):
        evaluator.score(None)


def test_nan_ratings_in_the_middle_of_a_run(keys, tmp_path, monkeypatch):
    """The weights are whole; what was validated before stays the best."""
    true, calls = MF.predict, []

    def ratings(model, interaction):
        calls.append(1)
        return true(model, interaction) * (math.nan if len(calls) == 3 else 1)

    whole = run_keys(keys(epochs=2, valid_metric="RMSE"), tmp_path / "whole")
    monkeypatch.setattr(MF, "predict", ratings)
    with pytest.raises(TrainingError, match=r"^the model predicts ratings that are not finite, after epoch 2 "
                                            r"of stage 'ratings', though its weights are .*--epochs=2 ends"):
        run_keys(keys(valid_metric="RMSE"), tmp_path / "run")
    monkeypatch.undo()
    ended = run(resume=tmp_path / "run", overrides={"epochs": 2})
    found, expected = (without_times(made.metrics) for made in (ended, whole))
    assert found["test"] == expected["test"] and np.isfinite(found["history"][-1]["valid_score"])


def test_nan_scores_are_not_the_best_epoch(keys, tmp_path, monkeypatch):
    true, calls = MF.full_sort_predict, []

    def scores(model, interaction):
        calls.append(1)
        return true(model, interaction) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(MF, "full_sort_predict", scores)
    made = run_keys(keys(), tmp_path / "run")
    assert [entry["valid_score"] == 0 for entry in made.metrics["history"]] == [False, False, True, False]
    assert made.metrics["best_epoch"] != 2
    assert "such items rank last" in (made.folder / "train.log").read_text()
