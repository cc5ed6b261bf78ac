"""MuSiC's vectorised U-Net."""

import itertools

import torch
from torch import Tensor, nn

from recbole_mmdiff.diffusion._checks import check_choice, check_count, check_interval
from recbole_mmdiff.diffusion.denoisers import ACTIVATIONS, check_time_dim, embedded_time


class VectorUNet(nn.Module):
    """A U-Net whose levels are vectors, conditioned on time and, where there is one, on a vector.

    MuSiC, section 3.3.3. Blocks of widths ``dim -> hidden_sizes`` go down, one block of the last
    width stays there, and blocks of the same widths go up again, back to ``dim``; each block on the
    way up also takes the output of the way down at its level, side by side with its input. A linear
    layer follows. A block computes ``dropout(activation(Linear(h) + W_t sinusoid(t) + W_c c))``, and
    the condition is added to ``x_t`` at the input. ``W_c`` has no bias, so that no condition is the
    same as a condition of zeros and one batch may hold rows with and without one (``keep``).

    The paper leaves open what a block is and how time and condition enter it: this is our reading.
    Its Eq. 7 counts the frequencies from ``i = 1`` and alternates sines and cosines;
    ``sinusoidal_embedding`` counts from 0 (frequencies 1 to 1/10000) and puts the sines first.

    ``dim``: of the state and of the condition. Raises ``ValueError`` for sizes below 1, an empty
    ``hidden_sizes``, an odd ``time_dim`` or one below 4, an unknown activation, or a dropout outside
    ``[0, 1]``.
    """

    def __init__(
        self,
        dim: int,
        hidden_sizes: tuple[int, ...] = (16, 8),
        time_dim: int = 32,
        activation: str = "silu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        if not hidden_sizes:
            raise ValueError(f"hidden_sizes={hidden_sizes!r} must hold at least one size, one a level")
        for index, size in enumerate(hidden_sizes):
            check_count(f"hidden_sizes[{index}]", size)
        check_time_dim("time_dim", time_dim)
        check_choice("activation", activation, ACTIVATIONS)
        check_interval("dropout", dropout, 0.0, 1.0)
        levels = list(itertools.pairwise((dim, *hidden_sizes)))
        self.down = nn.ModuleList(nn.Linear(outer, inner) for outer, inner in levels)
        self.middle = nn.Linear(hidden_sizes[-1], hidden_sizes[-1])
        self.up = nn.ModuleList(nn.Linear(2 * inner, outer) for outer, inner in reversed(levels))
        self.widths = [layer.out_features for layer in (*self.down, self.middle, *self.up)]
        # W_t and W_c of all blocks side by side: one wide product instead of one a block.
        self.time_linear = nn.Linear(time_dim, sum(self.widths), bias=False)
        self.condition_linear = nn.Linear(dim, sum(self.widths), bias=False)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, t: float | Tensor, condition: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """``x (n, d)``, ``condition (n, d)`` or None, ``keep (n, 1)`` in {0, 1}; returns ``(n, d)``.

        ``t``: a float, ``(n,)``, or ``(n, time_dim)``, already embedded. ``keep=None`` keeps every
        condition.
        """
        shift = self.time_linear(embedded_time(t, self.time_linear))
        if condition is not None:
            if keep is not None:
                condition = keep * condition
            x = x + condition
            shift = shift + self.condition_linear(condition)
        shifts = iter(shift.split(self.widths, dim=-1))
        skips = []
        for layer in self.down:
            x = self._block(layer, x, next(shifts))
            skips.append(x)
        x = self._block(self.middle, x, next(shifts))
        for layer in self.up:
            x = self._block(layer, torch.cat((x, skips.pop()), dim=-1), next(shifts))
        return self.output(x)

    def _block(self, layer: nn.Linear, h: Tensor, shift: Tensor) -> Tensor:
        """``h (n, in)`` to ``(n, out)``; ``shift (n, out)`` or ``(out,)``: time and condition."""
        return self.dropout(self.activation(layer(h) + shift))
