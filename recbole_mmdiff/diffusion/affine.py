"""Sampling with an affine network as one affine map.

Where the noise network is affine in the state and the condition, so is every prediction, every step
and hence the whole guided sampler: ``x_0 = x_T @ A + c @ B + b``. The map is found by running the
*same* solver once on a probe of ``d + c + 1`` rows in float64, and then applied to any number of
users by two small matrix products, about a thousandth of the solver's work.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recbole_mmdiff.diffusion._checks import check_choice
from recbole_mmdiff.diffusion.denoisers import AffineParameters, MLPDenoiser, sinusoids
from recbole_mmdiff.diffusion.guidance import TimeInput, guided_noise, same_time
from recbole_mmdiff.diffusion.plans import Plan, run_plan

METHODS = ("auto", "general", "affine")


@dataclass(frozen=True)
class AffineMap:
    """``x_T, c -> x_T @ x_weight + c @ condition_weight + bias``, in float64.

    ``x_weight (d, d)``, ``condition_weight (c, d)``, ``bias (d,)``.
    """

    x_weight: np.ndarray
    condition_weight: np.ndarray
    bias: np.ndarray

    def __call__(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x (n, d)``, ``condition (n, c)`` to ``(n, d)``, in ``x``'s dtype and on its device."""
        bias = torch.from_numpy(self.bias).to(x)
        if condition is x:  # DiffCDR starts at the condition: one product does for both.
            return torch.addmm(bias, x, torch.from_numpy(self.x_weight + self.condition_weight).to(x))
        result = torch.addmm(bias, x, torch.from_numpy(self.x_weight).to(x))
        return result.addmm_(condition, torch.from_numpy(self.condition_weight).to(x))


def collapse(
    denoiser: MLPDenoiser,
    plan: Plan,
    guidance_scale: float = 1.0,
    time_input: TimeInput = same_time,
) -> AffineMap:
    """The affine map that ``plan`` computes with ``denoiser`` under classifier-free guidance.

    ``guidance_scale`` and ``time_input`` as in ``guided_noise``; the network predicts noise. For a
    deterministic plan only. The weights are read at the time of the call; no gradient flows back to
    them. Raises ``ValueError`` for a network with a non-linearity or a stochastic plan.
    """
    if plan.is_stochastic:
        raise ValueError("plan adds noise on the way; accepted: a deterministic sampler (eta=0)")
    parameters = denoiser.affine_parameters()
    times = tuple(float(time_input(time)) for time in plan.times)
    constants = _constants(
        parameters, sinusoids(times, denoiser.time_dim), guidance_scale, denoiser.keep_input
    )
    weight, upcoming = parameters.weight, iter(constants)

    def denoise(probe: np.ndarray, t: float) -> np.ndarray:
        prediction = probe @ weight
        prediction += next(upcoming)
        return prediction

    # Rows: the unit vectors of x_T, those of the condition, and the constant 1. Each coordinate of
    # the state is a linear combination of these, and the probe holds its coefficients.
    dim, condition_dim = weight.shape[0], parameters.condition_weight.shape[0]
    result = run_plan(plan, denoise, np.eye(dim + condition_dim + 1, dim))
    return AffineMap(result[:dim], result[dim:-1], result[-1])


def _constants(
    parameters: AffineParameters, embeddings: np.ndarray, scale: float, keep_input: bool
) -> np.ndarray:
    """What the network adds to ``x @ weight`` at each evaluation: ``(times, d + c + 1, d)``.

    The rows of ``x`` are 0; those of the condition carry the guidance scale (the unconditional
    branch has none of it); the last row is the constant of the network at that time.
    """
    weight, bias, time_weight, time_bias, condition_weight, condition_bias = parameters
    dim, condition_dim = weight.shape[0], condition_weight.shape[0]
    # A masked condition loses its layer's bias too, a masked input does not.
    bias_scale = 1.0 if keep_input else scale
    constants = np.zeros((len(embeddings), dim + condition_dim + 1, dim))
    constants[:, dim:-1] = (scale * condition_weight) @ weight
    hidden = embeddings @ time_weight + (time_bias + bias_scale * condition_bias)
    constants[:, -1] = hidden @ weight + bias
    return constants


@torch.no_grad()
def sample(
    denoiser: MLPDenoiser,
    x: Tensor,
    condition: Tensor,
    plan: Plan,
    guidance_scale: float = 1.0,
    time_input: TimeInput = same_time,
    method: str = "auto",
) -> Tensor:
    """Guided samples of a noise network, by the affine map where there is one. No gradient.

    ``x (n, d)``: the starting states (pure noise, or a source embedding as in DiffCDR);
    ``condition (n, c)``; ``plan``: from ``dpm_solver_plan``, ``dpm_solver_pp_plan`` or
    ``ddim_plan``, deterministic; ``guidance_scale`` and ``time_input`` as in ``guided_noise``
    (DiffCDR: ``lambda t: 1000 * max(t - 1/1000, 0)``). ``method``: ``"affine"``, ``"general"`` (the
    network at every evaluation), or ``"auto"``: affine where the denoiser says ``is_affine``.
    Returns ``(n, d)``. Raises ``ValueError`` for another method, a stochastic plan, ``"affine"``
    with a non-linear network, or rows that differ.
    """
    check_choice("method", method, METHODS)
    if x.shape[0] != condition.shape[0]:
        raise ValueError(f"condition has {condition.shape[0]} rows; accepted: {x.shape[0]}, as x has")
    if method == "affine" or (method == "auto" and getattr(denoiser, "is_affine", False)):
        return collapse(denoiser, plan, guidance_scale, time_input)(x, condition)
    return run_plan(plan, guided_noise(denoiser, condition, guidance_scale, time_input), x)
