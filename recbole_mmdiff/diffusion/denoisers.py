"""Noise networks on vectors."""

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from recbole_mmdiff.diffusion._checks import check_choice, check_count

ACTIVATIONS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
}


def sinusoidal_embedding(
    t: float | Tensor,
    dim: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """``[sin(t f_0) .. sin(t f_k), cos(t f_0) .. cos(t f_k)]``, ``f_i = 10000^(-i / (dim/2 - 1))``.

    Vaswani et al. 2017, section 3.5, in the arrangement of Ho et al. 2020: sines first, exponents
    over ``dim/2 - 1``. ``t``: a float, giving ``(dim,)``, computed in float64 and then cast; or a
    tensor ``(n,)`` of any real dtype, giving ``(n, dim)`` in its own floating dtype (torch's
    default for integers). ``dtype`` and ``device`` apply to a float ``t``. Raises ``ValueError``
    unless ``dim`` is an even number of at least 4.
    """
    check_time_dim("dim", dim)
    if not isinstance(t, Tensor) and torch.compiler.is_compiling():
        # A factor of a tensor stays an input of the graph; a constant would be compiled for each t.
        one = torch.ones(1, dtype=torch.float64, device=device)
        return sinusoidal_embedding(one * t, dim)[0].to(dtype or torch.get_default_dtype())
    if not isinstance(t, Tensor):
        row = torch.from_numpy(sinusoids((float(t),), dim)[0])
        # A copy in any case: the row belongs to the cache.
        return row.to(device=device, dtype=dtype or torch.get_default_dtype(), copy=True)
    t = t if t.is_floating_point() else t.to(torch.get_default_dtype())
    frequencies = torch.from_numpy(_frequencies(dim)).to(device=t.device, dtype=t.dtype)
    angles = t[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


@lru_cache(maxsize=16)
def _frequencies(dim: int) -> np.ndarray:
    half = dim // 2
    return np.exp(np.arange(half) * (-math.log(10000.0) / (half - 1)))


@lru_cache(maxsize=2048)
def sinusoids(times: tuple[float, ...], dim: int) -> np.ndarray:
    """``sinusoidal_embedding`` of several float times: ``(len(times), dim)`` in float64. Cached."""
    angles = np.array(times)[:, None] * _frequencies(dim)
    return np.concatenate((np.sin(angles), np.cos(angles)), axis=1)


def embedded_time(t: float | Tensor, layer: nn.Linear) -> Tensor:
    """What a layer that reads times takes: the sinusoids of ``t``, in its width, dtype and device.

    ``t``: a float, giving ``(time_dim,)``; ``(n,)``, giving ``(n, time_dim)``; or ``(n, time_dim)``,
    already embedded, only cast.
    """
    weight = layer.weight
    embedded = isinstance(t, Tensor) and t.dim() == 2
    time = t if embedded else sinusoidal_embedding(t, layer.in_features, weight.dtype, weight.device)
    return time.to(weight.dtype)


def check_time_dim(name: str, dim: int) -> None:
    """Raise ``ValueError`` unless ``dim`` is an even ``int`` of at least 4."""
    check_count(name, dim, minimum=4)
    if dim % 2:
        raise ValueError(f"{name}={dim!r} must be even")


class AffineParameters(NamedTuple):
    """An affine ``MLPDenoiser``, float64: ``output = (x + time + keep * cond) @ weight + bias``.

    ``time = sinusoids @ time_weight + time_bias`` and ``cond = c @ condition_weight +
    condition_bias``.
    """

    weight: np.ndarray
    """``(d, d)``"""
    bias: np.ndarray
    """``(d,)``"""
    time_weight: np.ndarray
    """``(time_dim, d)``"""
    time_bias: np.ndarray
    """``(d,)``"""
    condition_weight: np.ndarray
    """``(c, d)``"""
    condition_bias: np.ndarray
    """``(d,)``"""


class MLPDenoiser(nn.Module):
    """DiffCDR's noise network: time and condition are added to the input of a perceptron.

    ``h = x + Linear(sinusoid(t)) + keep * Linear(c)``, then linear layers
    ``dim -> hidden_sizes -> dim`` with ``hidden_activation`` between them (section 3.1). With
    ``"none"``, the published setting, the network is affine in ``(x, c)`` (``is_affine``). ``keep``
    comes after the bias of the condition's layer, so that a dropped condition leaves nothing
    behind; ``keep_input=True`` masks the condition itself instead (MMDCDR). ``residual=True`` adds
    ``x`` to the output: where there is little but noise, the noise is nearly ``x``, which layers with
    an activation learn slowly, and the first steps of a solver magnify their error. Raises ``ValueError``
    for sizes below 1, an odd ``time_dim`` or one below 4, or an unknown activation.
    """

    def __init__(
        self,
        dim: int,
        condition_dim: int,
        hidden_sizes: tuple[int, ...] = (128, 128),
        time_dim: int = 128,
        hidden_activation: str = "none",
        keep_input: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("condition_dim", condition_dim)
        check_time_dim("time_dim", time_dim)
        check_choice("hidden_activation", hidden_activation, ACTIVATIONS)
        for index, size in enumerate(hidden_sizes):
            check_count(f"hidden_sizes[{index}]", size)
        self.time_dim = time_dim
        self.hidden_activation = hidden_activation
        self.keep_input, self.residual = keep_input, residual
        self.time_linear = nn.Linear(time_dim, dim)
        self.condition_linear = nn.Linear(condition_dim, dim)
        sizes = (dim, *hidden_sizes, dim)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.activation = ACTIVATIONS[hidden_activation]()

    def forward(self, x: Tensor, t: float | Tensor, condition: Tensor, keep: Tensor | None = None) -> Tensor:
        """``x (n, d)``, ``t`` a float or ``(n,)``, ``condition (n, c)``, ``keep (n, 1)`` in {0, 1}.

        ``keep=None`` keeps every condition. Returns ``(n, d)``.
        """
        hidden = self._input(x, t, condition, keep)
        for layer in self.layers[:-1]:
            hidden = self.activation(layer(hidden))
        output = self.layers[-1](hidden)
        return x + output if self.residual else output

    def composed(
        self, x: Tensor, t: float | Tensor, condition: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """``forward`` of an affine network through the product of its layers, with gradient.

        The layers are multiplied with each other instead of with the batch: the same output and
        gradients up to rounding, at a cost that hardly grows with the rows. ``ValueError`` for a
        network that is not affine.
        """
        self._check_affine()
        # From the output back, where the matrices are thinnest.
        weight, bias = self.layers[-1].weight, self.layers[-1].bias
        for layer in reversed(self.layers[:-1]):
            bias = torch.addmv(bias, weight, layer.bias)
            weight = weight @ layer.weight
        return nn.functional.linear(self._input(x, t, condition, keep), weight, bias)

    def _input(
        self, x: Tensor, t: float | Tensor, condition: Tensor, keep: Tensor | None
    ) -> Tensor:
        """What enters the perceptron: state, time and condition, added: ``(n, d)``."""
        if keep is not None and self.keep_input:
            condition = keep * condition
        guidance = self.condition_linear(condition)
        if keep is not None and not self.keep_input:
            guidance = keep * guidance
        return x + self.time_linear(embedded_time(t, self.time_linear)) + guidance

    @property
    def is_affine(self) -> bool:
        """Whether the output is an affine function of ``(x, condition)`` at every time, of the form
        that ``affine_parameters`` gives."""
        return not self.residual and (self.hidden_activation == "none" or len(self.layers) == 1)

    def affine_parameters(self) -> AffineParameters:
        """The network as one affine map, float64, detached; ``ValueError`` if it is not one."""
        if not self.is_affine:
            raise ValueError(f"hidden_activation={self.hidden_activation!r} is not affine; accepted: 'none'")
        # From the output back, where the matrices are thinnest.
        weight, bias = _as_numpy(self.layers[-1])
        for layer in reversed(self.layers[:-1]):
            inner, inner_bias = _as_numpy(layer)
            bias = inner_bias @ weight + bias
            weight = inner @ weight
        return AffineParameters(weight, bias, *_as_numpy(self.time_linear), *_as_numpy(self.condition_linear))

    def _check_affine(self) -> None:
        if not self.is_affine:
            raise ValueError(
                f"hidden_activation={self.hidden_activation!r} is not affine; accepted: 'none'"
            )


def _as_numpy(layer: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    """``(weight (in, out), bias (out,))`` of a linear layer in float64."""
    weight, bias = layer.weight.detach().cpu().numpy(), layer.bias.detach().cpu().numpy()
    return weight.T.astype(np.float64), bias.astype(np.float64)
