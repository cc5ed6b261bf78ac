"""One step of an optimiser: mixed precision, clipping, mirror gradient."""

import torch
from torch.nn.utils import clip_grad_norm_

from recbole_mmdiff import distributed
from recbole_mmdiff.errors import at_least


class Stepper:
    """Steps of the stages of a run, by RecBole's keys and those of the mirror gradient.

    With ``enable_amp`` the loss is computed in bfloat16; with ``enable_scaler`` too in float16, which
    loses small gradients without a scaler.

    Args:
        config: the run's configuration.
        device: of the model.

    Raises:
        ConfigError: a negative value.
    """

    def __init__(self, config, device: torch.device):
        for key in ("mirror_interval", "mirror_descent", "mirror_ascent"):
            at_least(key, config[key], 0)
        self.interval = config["mirror_interval"]
        self.descent, self.ascent = config["mirror_descent"], config["mirror_ascent"]
        self.device, self.amp = device, bool(config["enable_amp"])
        self.scaler = torch.amp.GradScaler(device.type, enabled=bool(config["enable_scaler"]))
        self.half = torch.float16 if config["enable_scaler"] else torch.bfloat16

    def step(self, optimizer, loss_of, batch, clip: dict | None, number: int) -> torch.Tensor:
        """A step down the loss of a batch; the loss, detached.

        Args:
            loss_of: from a batch to a scalar.
            clip: arguments of ``clip_grad_norm_``, or None.
            number: of the batch in its epoch. Every ``mirror_interval``-th one is mirrored (Zhong et al.,
                WWW 2024): a step down by alpha_1 times the loss, then one up by alpha_2 times the loss
                that is found there.
        """
        if not self.interval or number % self.interval:
            return self._step(optimizer, loss_of, batch, clip, 1.0)
        loss = self._step(optimizer, loss_of, batch, clip, self.descent)
        self._step(optimizer, loss_of, batch, clip, -self.ascent)
        return loss

    def _step(self, optimizer, loss_of, batch, clip, factor: float) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.half, enabled=self.amp):
            loss = loss_of(batch)
        self.scaler.scale(factor * loss).backward()
        distributed.join_gradients(distributed.parameters_of(optimizer))
        if clip:
            # RecBole clips the scaled gradient; the norm is meant for the true one.
            self.scaler.unscale_(optimizer)
            clip_grad_norm_(distributed.parameters_of(optimizer), **clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        return loss.detach()
