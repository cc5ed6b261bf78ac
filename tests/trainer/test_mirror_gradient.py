"""Mirror gradient: every so many batches a step down and a step back up."""

import pytest
import torch
from running import assert_same_weights, run_in_pieces, run_keys, saved_metrics

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.diffusion import fold_in
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.sampled_pairwise import SampledPairwise
from recbole_mmdiff.trainer import make_trainer
from recbole_mmdiff.trainer.steps import Stepper

#: several batches of the toy domain's rows; nothing is validated
KEYS = {"train_batch_size": 4, "epochs": 2, "eval_step": 0, "learning_rate": 0.05, "checkpoint_interval": 100,
        "embedding_size": 4, "mirror_descent": 0.8, "mirror_ascent": 0.3}
#: a model of stages, one whose tables have gradients of rows, and one of RecBole's
MODELS = [("FREEDOM", {"dropout": 0.0, "knn_k": 3}),
          ("FREEDOM", {"dropout": 0.3, "knn_k": 3, "train_features": True, "reg_weight": 0.5,
                       "weight_decay": 0.01}),
          ("BPR", {"negative_sampler": "uniform", "num_negatives": 2})]


def model_of(config, parts):
    torch.manual_seed(6)
    return config.model_class(config, parts.train)


@pytest.fixture
def trained(ranking_config, toy_domain, tmp_path):
    """``trained(model, **keys)``: a trainer that has fitted, the model before, and the parts."""

    def fit(model, **keys):
        config = Config(config_dict=ranking_config(model, data_path=toy_domain, **{**KEYS, **keys}))
        parts = prepare_parts(config)
        built, start = (model_of(config, parts) for _ in range(2))
        trainer = make_trainer(config, built, None, tmp_path / "checkpoint.pth")
        trainer.fit(parts, saved=False)
        return trainer, start, parts

    return fit


def by_hand(trainer, model, parts, interval, optimiser=torch.optim.Adam):
    """The steps of both epochs with an optimiser of our own; gives the number of steps."""
    config, count = trainer.config, 0
    stage, = model.stages() if hasattr(model, "stages") else \
        [SampledPairwise(config, model, parts.train).stage(config["epochs"])]
    loss_of, = stage.losses
    model.seed = fold_in(config["seed"], 0)
    loader = stage_loader(config, parts.train, stage.data, config["train_batch_size"], model.seed)
    steps = optimiser(list(stage.parameters), lr=config["learning_rate"], weight_decay=config["weight_decay"])
    for epoch in range(config["epochs"]):
        model.epoch = epoch
        model.train()
        loader.set_epoch(epoch)
        if stage.before_epoch is not None:
            stage.before_epoch(epoch)
        for number, batch in enumerate(loader):
            mirrored = interval and number % interval == 0
            for factor in (config["mirror_descent"], -config["mirror_ascent"]) if mirrored else (1.0,):
                steps.zero_grad()
                (factor * loss_of(batch)).backward()
                steps.step()
                count += 1
    return count


@pytest.mark.parametrize("interval", [0, 1, 3])
@pytest.mark.parametrize(("model", "keys"), MODELS, ids=str)
def test_the_steps_by_hand(trained, model, keys, interval):
    """Bit for bit; without it, what a plain loop gives."""
    trainer, start, parts = trained(model, mirror_interval=interval, fused_optimizer=False, **keys)
    batches = -(-len(parts.train) // KEYS["train_batch_size"])
    assert batches > 3
    count = by_hand(trainer, start, parts, interval)
    assert count == 2 * (batches + (-(-batches // interval) if interval else 0))
    assert_same_weights(trainer.model, start)


@pytest.mark.parametrize("model", ["FREEDOM", "BPR"])
def test_it_makes_a_difference(trained, model):
    keys = MODELS[0][1] if model == "FREEDOM" else MODELS[2][1]
    changes = {}, {"mirror_interval": 3}, {"mirror_interval": 3, "mirror_ascent": 0.6}
    plain, mirrored, deeper = (trained(model, **{**keys, **change})[0].model.user_embedding.weight
                               for change in changes)
    assert not torch.equal(plain, mirrored)
    assert not torch.equal(mirrored, deeper)


def test_with_sgd_down_and_up_on_one_batch(trained):
    """Of one batch: w - a1 lr g(w), then + a2 lr g of where it is then. The loss told is the first."""
    keys = {**MODELS[0][1], "train_batch_size": 1000, "epochs": 1, "learner": "sgd", "learning_rate": 0.5}
    trainer, start, parts = trained("FREEDOM", mirror_interval=1, **keys)
    start.seed, start.epoch = fold_in(trainer.config["seed"], 0), 0
    start.train()
    batch = next(iter(stage_loader(trainer.config, parts.train, "target", 1000, start.seed)))
    losses = []
    for factor in (-0.8 * 0.5, 0.3 * 0.5):
        loss = start.ranking_loss(batch)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, [start.user_embedding.weight, start.item_embedding.weight])
        with torch.no_grad():
            start.user_embedding.weight += factor * gradients[0]
            start.item_embedding.weight += factor * gradients[1]
    torch.testing.assert_close(trainer.model.user_embedding.weight, start.user_embedding.weight)
    torch.testing.assert_close(trainer.model.item_embedding.weight, start.item_embedding.weight)
    assert losses[1] < losses[0]
    assert trainer.progress.history[0]["loss"] == pytest.approx([losses[0]])


def test_each_loss_of_a_stage_is_mirrored(tiny_config):
    """Of two losses: the optimiser steps down and up for each in turn."""
    config = Config(config_dict=tiny_config("EMCDR", mirror_interval=1, mirror_ascent=0.25))
    weight, calls = torch.nn.Parameter(torch.zeros(1)), []

    def loss_of(slope):
        def loss(batch):
            calls.append((slope, weight.item()))
            return -slope * weight.sum()

        return loss

    stepper, optimizer = Stepper(config, torch.device("cpu")), torch.optim.SGD([weight], lr=1.0)
    for slope in (1.0, 10.0):
        stepper.step(optimizer, loss_of(slope), None, None, 4)
    assert calls == [(1.0, 0.0), (1.0, 1.0), (10.0, 0.75), (10.0, 10.75)]
    assert weight.item() == 0.75 + 10 - 2.5


@pytest.mark.parametrize(("model", "keys"), MODELS[1:], ids=str)
def test_a_resumed_run_is_the_same(ranking_config, model, keys, tmp_path, monkeypatch):
    keys = ranking_config(model, mirror_interval=3, embedding_size=8, epochs=3, **keys)
    whole = run_keys(keys, tmp_path / "whole")
    resumed = run_in_pieces(keys, tmp_path / "pieces", 3, monkeypatch)
    assert_same_weights(resumed.model, whole.model)
    assert saved_metrics(resumed.folder) == saved_metrics(whole.folder)


@pytest.mark.parametrize(("model", "keys", "message"), [
    ("BPR", {"mirror_interval": 3}, r"mirror_interval: BPR is trained by RecBole's loop.*negative_sampler"),
    ("NCL", {"mirror_interval": 3}, r"mirror_interval: NCL is trained by RecBole's loop"),
    ("LightGCN", {"num_negatives": 2}, "num_negatives: 2 needs a negative_sampler"),
    ("MF", {"negative_sampler": "dns"}, "negative_sampler: 'dns' has no effect, as MF draws no negatives"),
    ("MF", {"num_negatives": 3}, "num_negatives: 3 has no effect"),
    ("FREEDOM", {"mirror_interval": -1}, "mirror_interval: -1 is too small, use 0 or more"),
    ("FREEDOM", {"mirror_interval": 3, "mirror_ascent": -0.2}, r"mirror_ascent: -0\.2 is too small"),
    ("FREEDOM", {"mirror_interval": 3, "mirror_descent": -1.0}, r"mirror_descent: -1\.0 is too small"),
])
def test_what_is_refused(ranking_config, model, keys, message, tmp_path):
    """RecBole's own loop would pass over it in silence."""
    with pytest.raises(ConfigError, match=message):
        run_keys(ranking_config(model, embedding_size=8, **keys), tmp_path / "run")


def test_recboles_loop_goes_on_without_it(ranking_config, tmp_path):
    made = run_keys(ranking_config("BPR", embedding_size=8, epochs=1, mirror_interval=0), tmp_path / "run")
    assert len(made.metrics["history"]) == 1
