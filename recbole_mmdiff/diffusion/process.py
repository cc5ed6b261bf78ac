"""The forward process, its posterior, and training targets.

Notation: ``x_t = alpha x_0 + sigma eps``. Coefficients are Python floats, or tensors with one value
a row (``(n,)``, as ``schedule.alpha_sigma`` returns them), which are spread over the columns here.
"""

import torch
from torch import Tensor
from torch.nn import functional

from recbole_mmdiff.diffusion._checks import check_choice, check_count
from recbole_mmdiff.diffusion.discrete import DiscreteSchedule
from recbole_mmdiff.diffusion.noise import keyed_uniform

PARAMETRISATIONS = ("eps", "x0")
_LOSSES = {"smooth_l1": functional.smooth_l1_loss, "mse": functional.mse_loss}


def _spread(coefficient: float | Tensor, like: Tensor) -> float | Tensor:
    """A coefficient a row, ``(n,)``, with trailing ones so that it multiplies ``(n, ...)``."""
    if not isinstance(coefficient, Tensor) or coefficient.dim() != 1:
        return coefficient
    return coefficient.view(-1, *[1] * (like.dim() - 1))


def q_sample(x0: Tensor, noise: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """A draw of ``q(x_t | x_0)``: ``alpha x_0 + sigma noise`` (Ho et al. 2020, Eq. 4).

    ``x0``, ``noise``: ``(n, ...)``, ``noise`` standard normal; ``alpha``, ``sigma``: float or
    ``(n,)``. Typical: ``q_sample(x0, noise, *schedule.alpha_sigma(t))`` for continuous times, or
    ``*schedule.alpha_sigma_at(step)`` for integer steps.
    """
    return _spread(alpha, x0) * x0 + _spread(sigma, x0) * noise


def x0_from_eps(x_t: Tensor, eps: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """The data implied by a noise: ``(x_t - sigma eps) / alpha``; shapes as in ``q_sample``."""
    return (x_t - _spread(sigma, x_t) * eps) / _spread(alpha, x_t)


def eps_from_x0(x_t: Tensor, x0: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """The noise implied by data: ``(x_t - alpha x_0) / sigma``; shapes as in ``q_sample``."""
    return (x_t - _spread(alpha, x_t) * x0) / _spread(sigma, x_t)


def posterior(
    x0: Tensor, x_t: Tensor, step: int | Tensor, schedule: DiscreteSchedule
) -> tuple[Tensor, float | Tensor]:
    """Mean and variance of ``q(x_{n-1} | x_n, x_0)`` (Ho et al. 2020, Eqs. 6 and 7).

    ``x0``, ``x_t``: ``(n, ...)``; ``step``: an int in ``1 .. T``, or LongTensor ``(n,)``, one a
    row. Returns the mean, ``(n, ...)``, and the variance of every coordinate: a float, or
    ``(n, 1, ...)`` for a tensor of steps. At step 1 the mean is ``x0`` and the variance 0. Raises
    ``ValueError`` for an int step outside ``1 .. T``.
    """
    if isinstance(step, Tensor):
        coefficients = schedule.posterior_coefficients_at(step, x0.dtype)
    else:
        coefficients = schedule.posterior_coefficients(step)
    data, state, variance = (_spread(value, x0) for value in coefficients)
    return data * x0 + state * x_t, variance


def diffusion_loss(
    output: Tensor,
    x0: Tensor,
    noise: Tensor,
    parametrisation: str = "eps",
    kind: str = "smooth_l1",
    reduction: str = "mean",
) -> Tensor:
    """Distance of a network's output from its target.

    The target is ``noise`` for ``parametrisation="eps"`` (Ho et al. 2020, Eq. 14) and ``x0`` for
    ``"x0"``. ``output``, ``x0``, ``noise``: ``(n, ...)``. ``kind``: ``"mse"`` or ``"smooth_l1"``
    (threshold 1). ``reduction``: ``"mean"`` over everything, a scalar, or ``"none"``, the mean of
    each row, ``(n,)``. Raises ``ValueError`` for other names or when the shapes differ.
    """
    check_choice("parametrisation", parametrisation, PARAMETRISATIONS)
    check_choice("kind", kind, _LOSSES)
    check_choice("reduction", reduction, ("mean", "none"))
    target = noise if parametrisation == "eps" else x0
    if output.shape != target.shape:
        raise ValueError(
            f"output has shape {tuple(output.shape)}; accepted: that of its target, {tuple(target.shape)}"
        )
    loss = _LOSSES[kind](output, target, reduction=reduction)
    return loss if reduction == "mean" else loss.flatten(1).mean(dim=1)


def antithetic_steps(
    num_samples: int,
    num_steps: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random training steps in mirrored pairs: ``n`` and ``T + 1 - n``, each uniform on ``1 .. T``.

    Counted from 0 these are ``t`` and ``T - 1 - t``. A batch then holds as many noisy as clean
    states, which lowers the variance of its loss. Returns LongTensor ``(num_samples,)``, first the
    draws and then their mirrors. ``generator`` must live on ``device``. Raises ``ValueError`` for
    counts below 1.
    """
    check_count("num_samples", num_samples)
    check_count("num_steps", num_steps)
    half = (num_samples + 1) // 2
    steps = torch.randint(1, num_steps + 1, (half,), generator=generator, device=device)
    return torch.cat((steps, num_steps + 1 - steps))[:num_samples]


def keyed_antithetic_steps(keys: Tensor, num_steps: int, seed: int) -> Tensor:
    """Mirrored pairs as a function of (seed, key): keys ``2k`` and ``2k + 1`` are a pair.

    ``keys``: LongTensor ``(n,)``, such as the position of a sample in its epoch; returns LongTensor
    ``(n,)`` of steps in ``1 .. T``, the same in whatever batch or process the key comes up. Raises
    ``ValueError`` for ``num_steps < 1``.
    """
    check_count("num_steps", num_steps)
    uniform = keyed_uniform(keys >> 1, 1, seed, torch.float64)[:, 0]
    steps = 1 + (uniform * num_steps).long()
    return torch.where(keys % 2 == 0, steps, num_steps + 1 - steps)
