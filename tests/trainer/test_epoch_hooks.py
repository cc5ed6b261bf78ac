"""``Stage.before_epoch`` and ``after_epoch``: when they are called, and what they may change."""

from itertools import chain

import pytest
import torch
from running import Killed, assert_same_weights
from torch import nn

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.model.base import Stage, StagedRecommender
from recbole_mmdiff.trainer import StagedTrainer


class Diary(StagedRecommender):
    """Notes what happens to it, and keeps a buffer that is made after each epoch."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("made", torch.zeros(1))
        self.diary = []

    def stages(self):
        one = Stage("one", "target", (self.loss,), [self.weight], 2, validates=False,
                    before_epoch=self.before, after_epoch=self.after)
        two = Stage("two", "target", (self.loss,), [self.weight], 3, prepare=self.prepare,
                    before_epoch=self.before, after_epoch=self.after)
        return [one, two]

    def prepare(self):
        self.diary.append(("prepare",))

    def before(self, epoch):
        assert self.training
        self.diary.append(("before", epoch, self.epoch))

    def loss(self, interaction):
        self.diary.append(("batch", self.epoch))
        return -self.weight.sum()

    def after(self, epoch):
        self.made.copy_(self.weight.detach())
        self.diary.append(("after", epoch, self.epoch))


class Scores:
    """Stands for the evaluator: foretold scores, noted in the model's diary."""

    def __init__(self, *scores):
        self.scores = list(scores)

    def score(self, model, phase="valid"):
        model.diary.append(("validate", model.made.item()))
        score = self.scores.pop(0)
        return score, {"ndcg@10": score}


@pytest.fixture
def make(tiny_config, tmp_path):
    """``make(evaluator)``: a trainer of two batches an epoch, and its data."""

    def build(evaluator):
        keys = {"learner": "sgd", "learning_rate": 1.0, "seed": 3, "eval_step": 1}
        config = Config(config_dict=tiny_config("MF", **keys))
        parts = prepare_parts(config)
        config["train_batch_size"] = -(-len(parts.train) // 2)
        model = Diary(config, parts.train)
        return StagedTrainer(config, model, evaluator, tmp_path / "checkpoint.pth"), parts

    return build


def epoch_of(number, validated=None):
    """What the diary holds of an epoch."""
    kept = [("before", number, number), ("batch", number), ("batch", number), ("after", number, number)]
    return kept + ([] if validated is None else [("validate", validated)])


def test_the_hooks_surround_the_batches_and_come_before_the_validation(make):
    trainer, parts = make(Scores(0.1, 0.3, 0.2))
    trainer.fit(parts)
    assert trainer.model.diary == [
        *epoch_of(0), *epoch_of(1), ("prepare",),
        *epoch_of(0, validated=6), *epoch_of(1, validated=8), *epoch_of(2, validated=10)]


def test_what_the_best_epoch_made_comes_back(make):
    trainer, parts = make(Scores(0.1, 0.3, 0.2))
    trainer.fit(parts)
    assert trainer.progress.best_epoch == 1
    assert trainer.model.weight.item() == trainer.model.made.item() == 8


@pytest.mark.parametrize("ends_after", range(1, 5))
def test_a_resumed_epoch_begins_with_its_hook(make, ends_after):
    """The epochs that are left, each from its beginning; ``prepare`` first if it is that stage."""
    whole, parts = make(Scores(0.1, 0.3, 0.2))
    whole.fit(parts)
    epochs = [epoch_of(0), epoch_of(1), epoch_of(0, 6), epoch_of(1, 8), epoch_of(2, 10)]
    first, parts = make(Scores(0.1, 0.3, 0.2))
    save, saved = first._save, []

    def save_and_die(loader=None, finished=False):
        save(loader, finished)
        saved.append(finished)
        if len(saved) == ends_after:
            raise Killed

    first._save = save_and_die
    with pytest.raises(Killed):
        first.fit(parts)
    assert [entry for entry in first.model.diary if entry != ("prepare",)] == [*chain(*epochs[:ends_after])]
    resumed, parts = make(Scores(*[0.1, 0.3, 0.2][max(0, ends_after - 2):]))
    resumed.fit(parts, resume=True)
    assert resumed.model.diary == [
        *chain(*epochs[ends_after:2]), ("prepare",), *chain(*epochs[max(2, ends_after):])]
    assert_same_weights(resumed.model, whole.model)
