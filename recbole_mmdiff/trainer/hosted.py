"""The trainer of a model: ours, mixed with the special one that RecBole keeps for it."""

from pathlib import Path

from recbole.trainer import Trainer
from recbole.utils import ModelType, get_trainer

from recbole_mmdiff import distributed
from recbole_mmdiff.data.preparation import Parts, train_loader
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.storage import load_plain
from recbole_mmdiff.trainer.checkpoint import load_checkpoint, load_weights, save_checkpoint
from recbole_mmdiff.trainer.guard import Guard
from recbole_mmdiff.trainer.staged import StagedTrainer


class HostedTrainer(Guard, Trainer):
    """Mixin for RecBole trainers with a ``fit`` of their own (NCL, S3Rec, RaCT).

    They train as RecBole wrote them, validated by our evaluator, and end in our checkpoint. They
    cannot go on in the middle of a training, which begins anew: RecBole does not save what they would need.
    """

    def __init__(self, config, model, evaluator=None, checkpoint: Path | None = None):
        super().__init__(config, model)
        self.phase_evaluator, self.checkpoint = evaluator, checkpoint

    def fit(self, parts: Parts, valid_data=None, verbose=True, saved=True, show_progress=False,
            callback_fn=None, resume: bool = False):
        """Run RecBole's own ``fit``; ``resume``: it has been run, and its checkpoint is read."""
        if resume:
            load_checkpoint(self.checkpoint, self.config, self.model)
            return self.best_valid_score, self.best_valid_result
        loader = train_loader(self.config, parts.train)
        for left_by_kill in Path(self.saved_model_file).parent.glob(f"{self.config['model']}-*.pth"):
            left_by_kill.unlink()
        result = super().fit(loader, parts.valid, verbose, saved, show_progress=False,
                             callback_fn=callback_fn)
        written = Path(self.saved_model_file)
        if written.is_file():
            # The weights of the best epoch; files of pretraining hold nothing else.
            load_weights(self.model, load_plain(written, self.device), written)
            written.unlink()
        if saved and self.checkpoint is not None:
            save_checkpoint(self.checkpoint, self.config, self.model, {}, finished=True)
        return result

    def _valid_epoch(self, valid_data, show_progress=False):
        return self.phase_evaluator.score(self.model)


def make_trainer(config, model, evaluator, checkpoint: Path | None = None) -> Trainer:
    """A trainer for ``model``; RecBole's special ones keep their epochs, or their whole ``fit``.

    Raises:
        ConfigError: a model that RecBole trains outside of torch, or a key of our loop with a model that
            it does not train.
    """
    if config["MODEL_TYPE"] == ModelType.DECISIONTREE:
        raise ConfigError(f"{config['model']}: decision trees are trained by libraries of their "
                          f"own, run them with RecBole itself")
    special = get_trainer(config["MODEL_TYPE"], config["model"])
    staged = hasattr(type(model), "stages")
    base = StagedTrainer if staged or special.fit is Trainer.fit else HostedTrainer
    if base is HostedTrainer and distributed.size() > 1:
        raise ConfigError(f"nproc: {config['model']} is trained by a RecBole trainer of its own, which runs "
                          f"in one process; leave it out")
    _refuse_keys_of_our_loop(config, model, base)
    if staged or special is Trainer:
        return StagedTrainer(config, model, evaluator, checkpoint)
    trainer = type(f"{base.__name__}Of{special.__name__}", (base, special), {})
    return trainer(config, model, evaluator, checkpoint)


def _refuse_keys_of_our_loop(config, model, base: type) -> None:
    """What RecBole's own loops, or models without negatives, would pass over in silence."""
    name, sampler, staged = config["model"], config["negative_sampler"], hasattr(type(model), "stages")
    if staged and not model.reads_sampler:
        for key, value, unset in (("negative_sampler", sampler, None),
                                  ("num_negatives", config["num_negatives"], 1)):
            if value != unset:
                raise ConfigError(f"{key}: {value!r} has no effect, as {name} draws no negatives by it; "
                                  f"leave it out")
    if not staged and not sampler and config["num_negatives"] != 1:
        raise ConfigError(f"num_negatives: {config['num_negatives']} needs a negative_sampler (uniform, say) "
                          f"with {name}; RecBole's own loader reads train_neg_sample_args")
    if sampler and base is HostedTrainer:
        raise ConfigError(f"negative_sampler: {name} is trained by a loop of its own, which draws other "
                          f"negatives than {sampler!r}; leave it out")
    if config["mirror_interval"] and not (staged or sampler):
        raise ConfigError(f"mirror_interval: {name} is trained by RecBole's loop, which has no mirror "
                          f"gradient; set it to 0, or name a negative_sampler (uniform, say) if it learns "
                          f"from pairs of a positive and a negative item")
