"""Training: stages, checkpoints, resume."""

from recbole_mmdiff.trainer.hosted import make_trainer
from recbole_mmdiff.trainer.staged import StagedTrainer

__all__ = ["StagedTrainer", "make_trainer"]
