"""Classifier-free guidance (Ho and Salimans 2022)."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from recbole_mmdiff.diffusion._checks import check_interval

TimeInput = Callable[[float], float]
"""Maps a continuous time of a schedule to what the network takes as its time."""


class ConditionalNetwork(Protocol):
    """``network(x, t, c, keep)``: ``x (n, d)``, ``c (n, c)``, ``keep (n, 1)`` or None."""

    def __call__(self, x: Tensor, t: float, condition: Tensor, keep: Tensor | None) -> Tensor: ...


def same_time(t: float) -> float:
    """The time input of a network that takes the schedule's own continuous time."""
    return t


def guided_noise(
    network: ConditionalNetwork,
    condition: Tensor,
    guidance_scale: float,
    time_input: TimeInput = same_time,
) -> Callable[[Tensor, float], Tensor]:
    """``denoise(x, t)`` giving ``eps_u + s (eps_c - eps_u)`` (Ho, Salimans 2022; DiffCDR, Eq. 3).

    ``condition``: ``(n, c)``; ``guidance_scale``: ``s``; 0 ignores the condition, 1 is plain
    conditional sampling. Both branches go through **one** forward of ``2n`` rows, told apart by
    ``keep`` (1 conditional, 0 not); with ``s = 1`` the unconditional branch has no weight and is
    left out. ``denoise`` takes ``x (n, d)`` and the schedule's time, which ``time_input`` turns
    into the network's. The output has the network's parametrisation: wrap it by ``noise_from_x0``
    for data prediction. Raises ``ValueError`` when ``x`` and ``condition`` differ in rows.
    """
    rows = condition.shape[0]
    scale = float(guidance_scale)
    twice = torch.cat((condition, condition))
    keep = condition.new_zeros(2 * rows, 1)
    keep[:rows] = 1.0

    def denoise(x: Tensor, t: float) -> Tensor:
        if x.shape[0] != rows:
            raise ValueError(f"x has {x.shape[0]} rows; accepted: {rows}, as condition has")
        if scale == 1.0:
            return network(x, time_input(t), condition, None)
        output = network(torch.cat((x, x)), time_input(t), twice, keep)
        conditional, unconditional = output[:rows], output[rows:]
        return torch.lerp(unconditional, conditional, scale)

    return denoise


def drop_condition(uniform: Tensor, probability: float) -> Tensor:
    """Mask for training with dropped conditions: 0 where ``uniform < probability``, else 1.

    ``uniform``: ``(n,)`` or ``(n, 1)`` numbers in ``[0, 1)``, best from ``keyed_uniform`` so that
    they do not depend on the batch; returns ``(n, 1)`` of its dtype, the ``keep`` of a network.
    Raises ``ValueError`` for a probability outside ``[0, 1]``.
    """
    check_interval("probability", probability, 0.0, 1.0)
    return (uniform >= probability).to(uniform.dtype).view(-1, 1)
