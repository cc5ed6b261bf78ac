"""The trainer of a model: ours, mixed with the special one that RecBole keeps for it."""

from pathlib import Path

from recbole.trainer import Trainer
from recbole.utils import ModelType, get_trainer

from recbole_mmdiff.data.preparation import Parts, train_loader
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.storage import load_plain
from recbole_mmdiff.trainer.checkpoint import load_weights, save_checkpoint
from recbole_mmdiff.trainer.staged import StagedTrainer


class HostedTrainer(Trainer):
    """Mixin for RecBole trainers with a ``fit`` of their own (NCL, S3Rec, RaCT).

    They train as RecBole wrote them, validated by our evaluator, and end in our checkpoint. They
    cannot go on in the middle of a run: RecBole does not save what they would need.
    """

    def __init__(self, config, model, evaluator=None, checkpoint: Path | None = None):
        super().__init__(config, model)
        self.phase_evaluator, self.checkpoint = evaluator, checkpoint

    def fit(self, parts: Parts, valid_data=None, verbose=True, saved=True, show_progress=False,
            callback_fn=None, resume: bool = False):
        """Run RecBole's own ``fit``; raises ConfigError when asked to resume."""
        if resume:
            raise ConfigError(f"--resume: {self.config['model']} is trained by a RecBole trainer "
                              f"that cannot be resumed; start it anew")
        loader = train_loader(self.config, parts.train)
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
        ConfigError: a model that RecBole trains outside of torch.
    """
    if config["MODEL_TYPE"] == ModelType.DECISIONTREE:
        raise ConfigError(f"{config['model']}: decision trees are trained by libraries of their "
                          f"own, run them with RecBole itself")
    special = get_trainer(config["MODEL_TYPE"], config["model"])
    if hasattr(type(model), "stages") or special is Trainer:
        return StagedTrainer(config, model, evaluator, checkpoint)
    base = StagedTrainer if special.fit is Trainer.fit else HostedTrainer
    trainer = type(f"{base.__name__}Of{special.__name__}", (base, special), {})
    return trainer(config, model, evaluator, checkpoint)
