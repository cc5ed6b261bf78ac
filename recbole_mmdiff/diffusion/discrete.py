"""Discrete noise schedules: ``T`` steps with variances ``beta_1 .. beta_T`` (Ho et al. 2020).

Steps are numbered as in the papers: step ``n`` runs from 1 (nearly clean) to ``T`` (noisiest), and
step 0 is the data. Code that counts its network's time from 0 passes ``n - 1`` to the network.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from recbole_mmdiff.diffusion._checks import check_choice, check_count, check_interval
from recbole_mmdiff.diffusion.schedule import NoiseSchedule

MAX_BETA = 0.999
"""Betas are clipped here: at 1 a step would erase its input and the posterior divide by zero."""


@dataclass(frozen=True)
class DiscreteSchedule(NoiseSchedule):
    """``alpha_bar_n = prod_{i <= n} (1 - beta_i)``; ``alpha = sqrt(alpha_bar)``.

    ``betas``: ``T`` floats in ``(0, 1)``. As a ``NoiseSchedule`` step ``n`` sits at ``t = n / T``
    and ``log alpha`` is linear between steps (Lu et al. 2022, Appendix D.4), so any sampler can
    drive a network trained on discrete steps. Raises ``ValueError`` for an empty list or a beta
    outside (0, 1).
    """

    betas: tuple[float, ...]
    t_start: float = field(init=False, default=1.0)
    t_end: float = field(init=False)
    log_alphas: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        betas = tuple(float(beta) for beta in self.betas)
        if not betas:
            raise ValueError("betas=() must hold at least one value")
        for index, beta in enumerate(betas):
            if not 0.0 < beta < 1.0:
                raise ValueError(f"betas[{index}]={beta!r} must lie strictly between 0 and 1")
        logs = accumulate((0.5 * math.log1p(-beta) for beta in betas), initial=0.0)
        # A frozen dataclass sets its derived fields this way; the hash is kept because hashing a
        # thousand floats at every cache look-up would cost more than the look-up.
        for name, value in {
            "betas": betas,
            "t_end": 1.0 / len(betas) if len(betas) > 1 else 0.5,
            "log_alphas": tuple(logs),
            "_hash": hash(betas),
        }.items():
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return self._hash

    @property
    def num_steps(self) -> int:
        """``T``."""
        return len(self.betas)

    def alpha_bar(self, step: int) -> float:
        """``alpha_bar`` of a step in ``0 .. T`` (``alpha_bar_0 = 1``)."""
        self._check_step(step, minimum=0)
        return math.exp(2.0 * self.log_alphas[step])

    def log_alpha(self, t: float) -> float:
        position = t * self.num_steps
        lower = min(max(int(position), 0), self.num_steps - 1)
        before, after = self.log_alphas[lower], self.log_alphas[lower + 1]
        return before + (position - lower) * (after - before)

    def inverse_log_alpha(self, log_alpha: float) -> float:
        # log_alphas falls; its negative rises, as bisect wants.
        upper = bisect_left(self.log_alphas, -log_alpha, key=lambda value: -value)
        upper = min(max(upper, 1), self.num_steps)
        before, after = self.log_alphas[upper - 1], self.log_alphas[upper]
        return (upper - 1 + (log_alpha - before) / (after - before)) / self.num_steps

    def log_alpha_tensor(self, t: Tensor) -> Tensor:
        table = _table(self, "log_alpha", t.device, t.dtype)
        position = t * self.num_steps
        lower = position.detach().floor().long().clamp(0, self.num_steps - 1)
        before, after = table[lower], table[lower + 1]
        return before + (position - lower) * (after - before)

    def alpha_sigma_at(self, step: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``(alpha, sigma)`` of integer steps: ``step`` is a LongTensor of values in ``0 .. T``.

        Both have its shape, on its device. A step outside the range is an index error of torch.
        """
        alpha = _table(self, "alpha", step.device, dtype)
        sigma = _table(self, "sigma", step.device, dtype)
        return alpha.take(step), sigma.take(step)

    def posterior_coefficients(self, step: int) -> tuple[float, float, float]:
        """``(c_0, c_t, variance)`` of ``q(x_{n-1} | x_n, x_0)``, mean ``c_0 x_0 + c_t x_n``.

        Ho et al. 2020, Eqs. 6 and 7; at step 1 it is ``(1, 0, 0)``. Raises ``ValueError`` for a
        step outside ``1 .. T``.
        """
        self._check_step(step, minimum=1)
        beta, before, now = self.betas[step - 1], self.log_alphas[step - 1], self.log_alphas[step]
        noise_before, noise_now = -math.expm1(2.0 * before), -math.expm1(2.0 * now)
        data = math.exp(before) * beta / noise_now
        state = math.sqrt(1.0 - beta) * noise_before / noise_now
        return data, state, beta * noise_before / noise_now

    def posterior_coefficients_at(
        self, step: Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for a LongTensor of steps in ``1 .. T``: three tensors of its shape."""
        names = ("posterior_data", "posterior_state", "posterior_variance")
        return tuple(_table(self, name, step.device, dtype)[step - 1] for name in names)

    def _check_step(self, step: int, minimum: int) -> None:
        if not minimum <= step <= self.num_steps:
            raise ValueError(f"step={step!r} must lie in {minimum} .. {self.num_steps}")


@lru_cache(maxsize=64)
def _table(schedule: DiscreteSchedule, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One coefficient of every step as a tensor, computed in float64 and kept on its device."""
    if name.startswith("posterior"):
        column = ("posterior_data", "posterior_state", "posterior_variance").index(name)
        steps = range(1, schedule.num_steps + 1)
        values = [schedule.posterior_coefficients(step)[column] for step in steps]
    elif name == "sigma":
        values = [math.sqrt(-math.expm1(2.0 * value)) for value in schedule.log_alphas]
    elif name == "alpha":
        values = [math.exp(value) for value in schedule.log_alphas]
    else:
        values = schedule.log_alphas
    return torch.tensor(values, dtype=torch.float64).to(device=device, dtype=dtype)


def linear_schedule(
    num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02, rescale: bool = True
) -> DiscreteSchedule:
    """Betas evenly spaced from ``beta_start`` to ``beta_end`` (Ho et al. 2020, section 4).

    ``rescale`` multiplies them by ``1000 / num_steps``: the range was chosen for 1,000 steps, and
    with 20 of them the unscaled one leaves ``alpha_bar_T = 0.82``, so that sampling from pure noise
    could not reach the data. Betas above 0.999 are clipped. Raises ``ValueError`` for
    ``num_steps < 1`` or betas outside ``0 < beta_start <= beta_end < 1``.
    """
    check_count("num_steps", num_steps)
    if not 0.0 < beta_start < 1.0:
        raise ValueError(f"beta_start={beta_start!r} must lie strictly between 0 and 1")
    if not beta_start <= beta_end < 1.0:
        raise ValueError(f"beta_end={beta_end!r} must lie in [beta_start={beta_start!r}, 1)")
    factor = 1000.0 / num_steps if rescale else 1.0
    slope = (beta_end - beta_start) / max(num_steps - 1, 1)
    betas = (factor * (beta_start + slope * index) for index in range(num_steps))
    return DiscreteSchedule(tuple(min(beta, MAX_BETA) for beta in betas))


def cosine_schedule(num_steps: int, offset: float = 0.008) -> DiscreteSchedule:
    """``alpha_bar_n = f(n/T) / f(0)``, ``f(u) = cos^2(pi/2 (u + offset) / (1 + offset))``.

    Nichol and Dhariwal 2021, Eq. 17. Betas above 0.999 are clipped. Raises ``ValueError`` for
    ``num_steps < 1`` or ``offset`` outside ``[0, 1]``.
    """
    check_interval("offset", offset, 0.0, 1.0)
    scale = 0.5 * math.pi / (1.0 + offset)
    return _from_alpha_bar(num_steps, lambda u: math.cos(scale * (u + offset)) ** 2)


def sqrt_schedule(num_steps: int, offset: float = 1e-4) -> DiscreteSchedule:
    """``alpha_bar_n = 1 - sqrt(n/T + offset)``, relative to its value at 0.

    Li et al. 2022 (Diffusion-LM), Appendix A: noise rises fast at first. The division by the value
    at ``n = 0`` makes step 0 exactly the data. Betas above 0.999 are clipped (the last one always
    is). Raises ``ValueError`` for ``num_steps < 1`` or ``offset`` outside ``[0, 0.5]``.
    """
    check_interval("offset", offset, 0.0, 0.5)
    return _from_alpha_bar(num_steps, lambda u: max(1.0 - math.sqrt(u + offset), 0.0))


def exp_schedule(num_steps: int, beta_min: float = 0.1, beta_max: float = 10.0) -> DiscreteSchedule:
    """``beta_n = 1 - exp(-beta_min / T - (2n - 1) (beta_max - beta_min) / (2 T^2))``.

    The linear VP-SDE integrated exactly over each of ``T`` steps (Song et al. 2021, Appendix C; the
    "exp" schedule of Yang et al. 2023, DreamRec), so
    ``alpha_bar_T = exp(-(beta_min + beta_max) / 2)`` whatever ``T``. Betas above 0.999 are clipped.
    Raises ``ValueError`` for ``num_steps < 1`` or unless ``0 <= beta_min <= beta_max`` with
    ``beta_max > 0``.
    """
    check_count("num_steps", num_steps)
    check_interval("beta_min", beta_min, 0.0, math.inf)
    if not (beta_min <= beta_max < math.inf and beta_max > 0.0):
        raise ValueError(f"beta_max={beta_max!r} must be positive, finite and at least {beta_min=}")
    slope = (beta_max - beta_min) / (2.0 * num_steps**2)
    betas = (-math.expm1(-beta_min / num_steps - (2 * n - 1) * slope) for n in range(1, num_steps + 1))
    return DiscreteSchedule(tuple(min(beta, MAX_BETA) for beta in betas))


def _from_alpha_bar(num_steps: int, alpha_bar: Callable[[float], float]) -> DiscreteSchedule:
    check_count("num_steps", num_steps)
    values = [alpha_bar(n / num_steps) for n in range(num_steps + 1)]
    # An alpha_bar that has reached 0 stays there: the clipped beta stands for it.
    betas = (1.0 - b / a if a > 0.0 else MAX_BETA for a, b in pairwise(values))
    return DiscreteSchedule(tuple(min(beta, MAX_BETA) for beta in betas))


_CONSTRUCTORS = {
    "linear": linear_schedule,
    "cosine": cosine_schedule,
    "sqrt": sqrt_schedule,
    "exp": exp_schedule,
}


def discrete_schedule(name: str, num_steps: int, **options: float) -> DiscreteSchedule:
    """A discrete schedule by name: ``linear``, ``cosine``, ``sqrt`` or ``exp``.

    ``options`` go to ``<name>_schedule``. Raises ``ValueError`` for an unknown name and
    ``TypeError`` for an option that schedule does not have.
    """
    check_choice("name", name, _CONSTRUCTORS)
    return _CONSTRUCTORS[name](num_steps, **options)
