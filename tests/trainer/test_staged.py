"""The staged trainer, on a toy model whose every step can be foretold."""

import math

import pytest
import torch
from recbole.utils import ModelType
from torch import nn

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.base import Stage, StagedRecommender
from recbole_mmdiff.storage import load_plain
from recbole_mmdiff.trainer import StagedTrainer, make_trainer
from recbole_mmdiff.trainer.checkpoint import save_checkpoint


class Toy(StagedRecommender):
    """Two numbers, each pulled by its own stage; every call of a loss is noted."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.first, self.second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.calls, self.plan = [], []

    def stages(self):
        return self.plan

    def pull(self, interaction):
        """Its gradient is -1: a step of SGD adds the learning rate."""
        self.calls.append(("pull", round(self.first.item(), 6)))
        return -self.first.sum()

    def push(self, interaction):
        """Its gradient is -10."""
        self.calls.append(("push", round(self.first.item(), 6)))
        return -10 * self.first.sum()

    def noisy(self, interaction):
        """Dropout from torch's global generator."""
        return -nn.functional.dropout(torch.ones(64), 0.5).mean() * self.second.sum()


class Scores:
    """Stands for the evaluator: foretold validation scores."""

    def __init__(self, *scores):
        self.scores = list(scores)

    def score(self, model, phase="valid"):
        score = self.scores.pop(0)
        return score, {"ndcg@10": score}


@pytest.fixture(scope="module")
def parts(tiny_config):
    return prepare_parts(Config(config_dict=tiny_config("MF", seed=3)))


@pytest.fixture
def make(tiny_config, parts, tmp_path):
    """``make(stages of a model, evaluator, **keys)``: a trainer of one batch an epoch."""

    def trainer(plan, evaluator=None, **keys):
        keys = {"learner": "sgd", "learning_rate": 1.0, "train_batch_size": 10**6, "seed": 3,
                "eval_step": 1, **keys}
        config = Config(config_dict=tiny_config("MF", **keys))
        model = Toy(config, parts.train)
        model.plan = plan(model)
        return StagedTrainer(config, model, evaluator, tmp_path / "checkpoint.pth")

    return trainer


def one_stage(epochs, *losses, **values):
    return lambda model: [Stage("only", "target", tuple(getattr(model, name) for name in losses),
                                [model.first], epochs, **values)]


def test_stages_run_in_their_order_on_their_own_parameters(make, parts):
    prepared = []

    def plan(model):
        return [Stage("one", "source", (model.pull,), [model.first], 2, validates=False,
                      prepare=lambda: prepared.append(("one", model.first.item()))),
                Stage("two", "overlap_users", (model.noisy,), [model.second], 3, validates=False,
                      learning_rate=0.5, prepare=lambda: prepared.append(("two", model.first.item())))]

    trainer = make(plan)
    trainer.fit(parts)
    assert [(entry["stage"], entry["epoch"]) for entry in trainer.progress.history] \
        == [("one", 0), ("one", 1), ("two", 0), ("two", 1), ("two", 2)]
    assert prepared == [("one", 0.0), ("two", 2.0)]
    assert trainer.model.first.item() == 2.0
    assert 0 < trainer.model.second.item() < 3 * 0.5 * 2


def test_the_optimiser_steps_between_two_losses(make, parts):
    trainer = make(one_stage(2, "pull", "push", validates=False))
    trainer.fit(parts)
    assert trainer.model.calls == [("pull", 0), ("push", 1), ("pull", 11), ("push", 12)]
    assert [entry["loss"] for entry in trainer.progress.history] == [[0, -10], [-11, -120]]


def test_batch_size_of_a_stage(make, parts):
    rows = len(parts.train.inter_feat)
    trainer = make(one_stage(1, "pull", validates=False, batch_size=100))
    trainer.fit(parts)
    assert len(trainer.model.calls) == math.ceil(rows / 100)


def test_weights_of_the_best_epoch_come_back(make, parts):
    trainer = make(one_stage(5, "pull"), Scores(0.1, 0.5, 0.3, 0.5, 0.2))
    assert trainer.fit(parts) == (0.5, {"ndcg@10": 0.5})
    # An equal score is, for RecBole, an improvement.
    assert trainer.progress.best_epoch == 3
    assert trainer.model.first.item() == 4.0
    assert [entry["valid_score"] for entry in trainer.progress.history] == [0.1, 0.5, 0.3, 0.5, 0.2]


def test_it_stops_without_improvement(make, parts):
    trainer = make(one_stage(50, "pull"), Scores(0.4, 0.3, 0.2, 0.1, 0.0, 9.0), stopping_step=2)
    trainer.fit(parts)
    assert len(trainer.progress.history) == 4
    assert trainer.model.first.item() == 1.0


def test_a_smaller_error_is_better(make, parts):
    trainer = make(one_stage(3, "pull"), Scores(2.0, 1.0, 3.0), valid_metric="RMSE")
    assert trainer.fit(parts)[0] == 1.0
    assert trainer.model.first.item() == 2.0


def test_a_stage_forgets_the_scores_of_the_one_before(make, parts):
    def plan(model):
        return one_stage(2, "pull")(model) + one_stage(2, "pull")(model)

    trainer = make(plan, Scores(0.9, 0.8, 0.2, 0.1))
    trainer.fit(parts)
    assert trainer.progress.best_score == 0.2
    assert trainer.model.first.item() == 2.0  # one epoch kept of each stage


def test_a_stage_that_does_not_validate_keeps_its_last_epoch(make, parts):
    trainer = make(one_stage(3, "pull", validates=False), Scores())
    trainer.fit(parts)
    assert trainer.model.first.item() == 3.0
    assert not any("valid_score" in entry for entry in trainer.progress.history)


def test_eval_step_and_callback(make, parts):
    seen = []
    trainer = make(one_stage(4, "pull"), Scores(0.1, 0.2), eval_step=2)
    trainer.fit(parts, callback_fn=lambda epoch, score: seen.append((epoch, score)))
    assert seen == [(1, 0.1), (3, 0.2)]


@pytest.mark.parametrize(("limit", "moved"), [(None, 10.0), (0.25, 0.25), (100.0, 10.0)])
def test_gradient_clipping(make, parts, limit, moved):
    clip = None if limit is None else {"max_norm": limit}
    trainer = make(one_stage(1, "push", validates=False), clip_grad_norm=clip)
    trainer.fit(parts)
    assert trainer.model.first.item() == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_stage_and_epoch(make, parts, value):
    trainer = make(one_stage(3, "pull", validates=False))
    stage = trainer.model.plan[0]
    broken = Stage(stage.name, stage.data, (lambda batch: trainer.model.first.sum() * value,),
                   [trainer.model.first], 3)
    trainer.model.plan = [broken]
    with torch.no_grad():
        trainer.model.first.fill_(1)
    with pytest.raises(ValueError, match=r"'only'.*epoch 0.*learning_rate"):
        trainer.fit(parts)


@pytest.mark.parametrize("kills", [1, 2, 3, 4])
def test_resume_draws_what_an_uninterrupted_run_draws(make, parts, kills):
    """Dropout uses torch's own stream, also in the first epoch after the border of two stages."""
    def plan(model):
        return [Stage(name, "target", (model.noisy,), [model.second], 3, validates=False)
                for name in ("one", "two")]

    whole = make(plan)
    whole.fit(parts)
    halted = make(plan)
    save, done = halted._save, []

    def save_and_stop(loader=None, finished=False):
        save(loader, finished)
        done.append(1)
        if len(done) == kills:
            raise KeyboardInterrupt

    halted._save = save_and_stop
    with pytest.raises(KeyboardInterrupt):
        halted.fit(parts)
    torch.rand(5)
    resumed = make(plan)
    resumed.fit(parts, resume=True)
    assert resumed.model.second.item() == whole.model.second.item()
    assert [e["loss"] for e in resumed.progress.history] == [e["loss"] for e in whole.progress.history]


def test_checkpoint_holds_plain_types_only(make, parts, tmp_path):
    trainer = make(one_stage(2, "pull"), Scores(0.1, 0.2), learner="adam")
    trainer.fit(parts)
    raw = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert raw["format"] == 1 and raw["model"] == "MF" and raw["finished"]
    assert raw["config"]["seed"] == 3 and raw["progress"]["stage"] == 1

    def walk(value):
        assert isinstance(value, (dict, list, tuple, str, int, float, bool, torch.Tensor, type(None)))
        for inner in value.values() if isinstance(value, dict) else \
                value if isinstance(value, (list, tuple)) else ():
            walk(inner)

    walk(raw)


def test_a_run_without_saving_writes_nothing(make, parts, tmp_path):
    make(one_stage(2, "pull", validates=False)).fit(parts, saved=False)
    assert not (tmp_path / "checkpoint.pth").exists()


def test_checkpoint_interval(make, parts, tmp_path, monkeypatch):
    trainer = make(one_stage(5, "pull", validates=False), checkpoint_interval=2)
    saved = []
    monkeypatch.setattr("recbole_mmdiff.trainer.staged.save_checkpoint",
                        lambda path, config, model, progress, **tensors: saved.append(
                            (progress["stage"], progress["epoch"])))
    trainer.fit(parts)
    assert saved == [(0, 2), (0, 4), (1, 0), (1, 0)]


def test_checkpoint_written_whole_or_not_at_all(make, parts, tmp_path):
    trainer = make(one_stage(1, "pull", validates=False))
    trainer.fit(parts)
    path = tmp_path / "checkpoint.pth"
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no plain form"):
        save_checkpoint(path, trainer.config, trainer.model, {}, what=object())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]
    assert load_plain(path)["finished"]


def test_decision_trees_are_refused(tiny_config, parts):
    config = Config(config_dict=tiny_config("MF"))
    config["MODEL_TYPE"] = ModelType.DECISIONTREE
    with pytest.raises(ConfigError, match="decision trees"):
        make_trainer(config, None, None)
