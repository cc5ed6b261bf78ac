"""Noise schedules ``x_t = alpha(t) x_0 + sigma(t) eps`` with ``alpha^2 + sigma^2 = 1``.

A schedule answers in two ways. Samplers ask at *Python floats* and get float64 from ``math``, so
that no coefficient ever passes through float32 (near ``t = 0`` the naive ``sqrt(1 - alpha^2)``
loses half of its digits there). Training asks at tensors, where ``sigma`` goes through ``expm1``
and stays exact to the tensor's own precision.

Schedules are frozen and hashable: the sampler plans computed from them are cached.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_mmdiff.diffusion._checks import check_interval


class NoiseSchedule(ABC):
    """A variance-preserving schedule over continuous time ``t``, in ``[0, t_start]``; 0 is clean.

    A subclass gives ``log_alpha``, its inverse, and its tensor version; ``t_start`` (the time of
    the noisiest state, T) and ``t_end`` (where samplers stop, just above 0). The half log-SNR is
    ``lambda(t) = log(alpha(t) / sigma(t))``, strictly decreasing in ``t`` (Lu et al. 2022, section
    2.2).
    """

    t_start: float
    t_end: float

    @abstractmethod
    def log_alpha(self, t: float) -> float:
        """``log alpha(t)`` in float64."""

    @abstractmethod
    def inverse_log_alpha(self, log_alpha: float) -> float:
        """The time ``t`` at which ``log alpha(t)`` equals ``log_alpha`` (<= 0)."""

    @abstractmethod
    def log_alpha_tensor(self, t: Tensor) -> Tensor:
        """``log alpha`` elementwise: the shape and floating dtype of ``t``."""

    def alpha(self, t: float) -> float:
        """Signal coefficient ``alpha(t)``."""
        return math.exp(self.log_alpha(t))

    def sigma(self, t: float) -> float:
        """Noise coefficient ``sigma(t) = sqrt(1 - alpha(t)^2)``, without cancellation near 0."""
        return math.sqrt(-math.expm1(2.0 * self.log_alpha(t)))

    def half_logsnr(self, t: float) -> float:
        """``lambda(t) = log alpha(t) - log sigma(t)``; ``t`` must be positive."""
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * math.log(-math.expm1(2.0 * log_alpha))

    def inverse_half_logsnr(self, half_logsnr: float) -> float:
        """The time at which ``lambda(t)`` equals ``half_logsnr``."""
        # alpha^2 = sigmoid(2 lambda), so log alpha = -softplus(-2 lambda) / 2, written to never
        # overflow.
        twice = -2.0 * half_logsnr
        softplus = max(twice, 0.0) + math.log1p(math.exp(-abs(twice)))
        return self.inverse_log_alpha(-0.5 * softplus)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha, sigma)`` at a tensor of continuous times, each of the shape and dtype of ``t``.

        Relative error of both is that of the dtype, also in float32 at ``t = 1e-4``.
        """
        log_alpha = self.log_alpha_tensor(t)
        return log_alpha.exp(), torch.expm1(2.0 * log_alpha).neg().sqrt()


@dataclass(frozen=True)
class VPSchedule(NoiseSchedule):
    """Linear VP schedule: ``log alpha(t) = -(beta_max - beta_min) t^2 / 4 - beta_min t / 2``.

    Song et al. 2021 (VP-SDE, Eq. 32); Lu et al. 2022, Appendix D.4, for the inverse. Raises
    ``ValueError`` unless ``0 <= beta_min < beta_max`` and ``0 < t_end < t_start``.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_start: float = 1.0
    t_end: float = 1e-4

    def __post_init__(self) -> None:
        check_interval("beta_min", self.beta_min, 0.0, math.inf)
        if not self.beta_min < self.beta_max < math.inf:
            raise ValueError(
                f"beta_max={self.beta_max!r} must be finite and above beta_min={self.beta_min!r}"
            )
        _check_time_range(self.t_start, self.t_end, math.inf)

    def _formula(self, t: float | Tensor) -> float | Tensor:
        return -t * (0.25 * (self.beta_max - self.beta_min) * t + 0.5 * self.beta_min)

    def log_alpha(self, t: float) -> float:
        return self._formula(t)

    def log_alpha_tensor(self, t: Tensor) -> Tensor:
        return self._formula(t)

    def inverse_log_alpha(self, log_alpha: float) -> float:
        # The root of slope/4 t^2 + beta_min/2 t + log_alpha = 0 in the form that does not subtract.
        half_min = 0.5 * self.beta_min
        root = math.sqrt(half_min * half_min - (self.beta_max - self.beta_min) * log_alpha)
        return -2.0 * log_alpha / (half_min + root) if log_alpha else 0.0


@dataclass(frozen=True)
class CosineVPSchedule(NoiseSchedule):
    """Cosine VP schedule: ``alpha(t) = cos(pi/2 (t + s) / (1 + s)) / cos(pi/2 s / (1 + s))``.

    Nichol and Dhariwal 2021, Eq. 17, in continuous time; ``t_start`` stays below 1, where alpha is
    0 (0.9946: Lu et al. 2022, Appendix D.4). Raises ``ValueError`` for ``offset`` outside
    ``[0, 1]`` or times outside ``0 < t_end < t_start < 1``.
    """

    offset: float = 0.008
    t_start: float = 0.9946
    t_end: float = 1e-4

    def __post_init__(self) -> None:
        check_interval("offset", self.offset, 0.0, 1.0)
        _check_time_range(self.t_start, self.t_end, math.nextafter(1.0, 0.0))

    @property
    def _base(self) -> float:
        return 0.5 * math.pi * self.offset / (1.0 + self.offset)

    @property
    def _speed(self) -> float:
        return 0.5 * math.pi / (1.0 + self.offset)

    def log_alpha(self, t: float) -> float:
        # cos(a + d) / cos(a) = 1 - (2 sin^2(d/2) + tan(a) sin(d)): exact for small d.
        angle = self._speed * t
        drop = 2.0 * math.sin(0.5 * angle) ** 2 + math.tan(self._base) * math.sin(angle)
        return math.log1p(-drop)

    def log_alpha_tensor(self, t: Tensor) -> Tensor:
        angle = self._speed * t
        drop = 2.0 * torch.sin(0.5 * angle) ** 2 + math.tan(self._base) * torch.sin(angle)
        return torch.log1p(-drop)

    def inverse_log_alpha(self, log_alpha: float) -> float:
        slope = math.tan(self._base)
        angle = math.acos(math.cos(self._base) * math.exp(log_alpha)) - self._base
        # acos loses digits near t = 0; one Newton step on the same stable form gives them back.
        drop = 2.0 * math.sin(0.5 * angle) ** 2 + slope * math.sin(angle)
        gradient = math.sin(angle) + slope * math.cos(angle)
        if gradient > 0.0:
            angle -= (drop + math.expm1(log_alpha)) / gradient
        return angle / self._speed


def _check_time_range(t_start: float, t_end: float, latest: float) -> None:
    if not 0.0 < t_start <= latest:
        raise ValueError(f"t_start={t_start!r} must be positive and at most {latest}")
    if not 0.0 < t_end < t_start:
        raise ValueError(f"t_end={t_end!r} must lie strictly between 0 and t_start={t_start!r}")
