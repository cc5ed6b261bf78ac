"""What ends a training that has gone wrong: losses, weights or scores that are no numbers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from recbole_mmdiff.errors import TrainingError
from recbole_mmdiff.model.base import Stage

CHECK_EVERY = 50    # batches on a GPU, which each look has to wait for


class Losses:
    """The losses of the batches of an epoch, kept on the device: a bad one is found, with its batch, without
    waiting for a GPU in every batch.

    Args:
        batches, count: how many batches there are, and losses of each.
        device: of the model.
    """

    def __init__(self, batches: int, count: int, device: torch.device):
        self.values = torch.zeros(batches, count, device=device)
        self.every = 1 if device.type == "cpu" else CHECK_EVERY
        self.checked = 0

    def first_bad(self, batch: int) -> tuple[int, int] | None:
        """Batch and place of the first loss that is no finite number, once in ``CHECK_EVERY`` batches and at
        the last one; ``batch`` is the one that was done."""
        if (batch + 1) % self.every and batch + 1 < len(self.values):
            return None
        bad = (~self.values[self.checked:batch + 1].isfinite()).nonzero()
        if len(bad):
            return self.checked + int(bad[0, 0]), int(bad[0, 1])
        self.checked = batch + 1
        return None

    def means(self) -> tuple[float, ...]:
        """The mean of each loss over the batches."""
        return tuple(self.values.mean(dim=0).tolist())


class Guard:
    """Mixin for trainers: stops at losses and weights that are no numbers, before they reach a checkpoint,
    and says where, why, and how to go on."""

    stage: Stage | None = None      # under way; RecBole's own ``fit`` has none
    _epoch = _batch = 0     # of RecBole's loop; batches from 1

    def _train_epoch(self, train_data, epoch_idx, *args, **kwargs):
        """RecBole's loop over an epoch, whose batches are counted."""
        self._epoch, self._batch = epoch_idx, 0
        with self._watched(epoch_idx):
            return super()._train_epoch(train_data, epoch_idx, *args, **kwargs)

    def _check_nan(self, loss) -> None:
        """RecBole's loop asks this of every loss, before the step."""
        self._batch += 1
        if not math.isfinite(value := loss.item()):
            raise self._stopped(f"the training loss is {value} in epoch {self._epoch}, batch "
                                f"{self._batch}", self._epoch, self._batch - 1)

    def _refuse_bad_loss(self, losses: Losses, batch: int, epoch: int) -> None:
        bad = losses.first_bad(batch)
        if bad is None:
            return
        batch, place = bad
        values, count = losses.values[:, place], len(self.stage.losses)
        which = f" {place + 1} of {count} ({_name(self.stage.losses[place])})" if count > 1 else ""
        before = f" ({values[batch - 1]:.4g} in the batch before)" if batch else ""
        raise self._stopped(f"the training loss{which} of stage {self.stage.name!r} is {values[batch]:.4g} "
                            f"in epoch {epoch}, batch {batch + 1} of {len(values)}{before}", epoch, batch)

    @contextmanager
    def _watched(self, epoch: int) -> Iterator[None]:
        """An epoch: its last step may break weights that no loss shows any more, and what follows from broken
        weights may be a ValueError of another name."""
        try:
            yield
        except ValueError as error:
            if not isinstance(error, TrainingError):
                self._refuse_broken_weights(epoch)
            raise
        self._refuse_broken_weights(epoch)

    def _refuse_broken_weights(self, epoch: int) -> None:
        broken = [name for name, weight in self.model.named_parameters() if not weight.isfinite().all()]
        if broken:
            of = f" of stage {self.stage.name!r}" if self.stage else ""
            raise self._stopped(f"the weights {broken[0]!r} are not finite in epoch {epoch}{of}", epoch)

    def _stopped(self, what: str, epoch: int, batch: int = -1) -> TrainingError:
        """``what`` went wrong, with the likely cause and what can be done; ``batch`` from 0."""
        cause = likely_cause(self.model, self.config, self._rate(), at_once=epoch == batch == 0)
        return TrainingError(f"{what}; {cause}{self._way_on(epoch)}")

    def _rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"] if self.optimizer else self.learning_rate

    def _way_on(self, epoch: int) -> str:
        """What can be done with the last checkpoint: keys of the experiment cannot change, its length can."""
        path = Path(self.saved_model_file)
        if self.stage is None or not path.is_file():
            return ""
        kept = f". {path} is of before and stays as it is"
        if epoch and self.stage.epochs == self.config["epochs"] and self._is_last(self.stage):
            kept += f": --resume={path.parent} --epochs={epoch} ends with what was learned until then"
        return kept

    def _is_last(self, stage: Stage) -> bool:
        return not hasattr(self.model, "stages") or self.model.stages()[-1].name == stage.name


def likely_cause(model: nn.Module, config, rate: float, at_once: bool) -> str:
    """Why a loss is no number, as far as it can be told, and what to try.

    Args:
        rate: the learning rate.
        at_once: whether no step was made before.
    """
    broken = [name for name, values in model.named_buffers()
              if values.layout == torch.strided and values.isnan().any()]
    if broken:
        return f"its input {broken[0]!r} holds NaN: look at the features or data that it is made of"
    if config["enable_amp"]:
        return f"mixed precision may not hold it: enable_amp: False; or lower learning_rate (now {rate:g})"
    if at_once:
        return "no step was made before, so not learning_rate: look at the data, and at init_std"
    return f"it diverged: lower learning_rate (now {rate:g}), or set clip_grad_norm"


def _name(loss_of) -> str:
    return getattr(loss_of, "__name__", type(loss_of).__name__)
