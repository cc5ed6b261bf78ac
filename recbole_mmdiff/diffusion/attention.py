"""A noise network that attends over tokens: the noisy vector, its conditions, and the time."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.diffusion._checks import check_count
from recbole_mmdiff.diffusion.denoisers import check_time_dim, sinusoidal_embedding


class StaticTokens(NamedTuple):
    """What the conditions of n rows are to every step: see ``TokenAttention.static``."""

    projected: Tensor
    """(n, m, 3 d): queries, keys and values of the condition tokens."""
    present: Tensor
    """(n, m + 2) bool: which of the tokens x_t, conditions, time a row has."""


class TokenAttention(nn.Module):
    """CCDRec's conditional estimator: self-attention over the tokens [x_t, conditions, time].

    Every token is normalised (LayerNorm without parameters), one head of attention without bias joins
    them, and the mean over the tokens that a row has is the prediction (paragraph "Conditional
    Estimator"). The time token is the sinusoidal embedding. A missing condition is neither attended to
    nor averaged. Raises ``ValueError`` for an odd ``dim`` or one below 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_count("dim", dim)
        check_time_dim("dim", dim)
        self.dim = dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        nn.init.xavier_uniform_(self.qkv.weight)

    def forward(self, x: Tensor, t: float | Tensor, conditions: Tensor, present: Tensor) -> Tensor:
        """The prediction (n, d).

        ``x (n, d)``; ``t`` a float or ``(n,)``, as the sinusoids take it; ``conditions (n, m, d)``;
        ``present (n, m)`` bool.
        """
        return self.attend(x, t, self.static(conditions, present))

    def static(self, conditions: Tensor, present: Tensor) -> StaticTokens:
        """The part of a forward that depends on the conditions alone, for all steps of a sampler."""
        ends = present.new_ones(len(present), 1)
        return StaticTokens(self._project(conditions), torch.cat([ends, present, ends], 1))

    def attend(self, x: Tensor, t: float | Tensor, static: StaticTokens) -> Tensor:
        """``forward`` with prepared conditions: (n, d)."""
        if isinstance(t, Tensor):
            time = sinusoidal_embedding(t, self.dim).to(x.dtype)
        else:
            time = sinusoidal_embedding(t, self.dim, x.dtype, x.device)[None]
        time = self._project(time).expand(len(x), -1)
        tokens = torch.cat([self._project(x)[:, None], static.projected, time[:, None]], 1)
        queries, keys, values = tokens.chunk(3, -1)
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=static.present[:, None, :])
        shown = static.present[:, :, None].to(attended.dtype)
        return (attended * shown).sum(1) / shown.sum(1)

    def _project(self, tokens: Tensor) -> Tensor:
        return self.qkv(functional.layer_norm(tokens, (self.dim,)))
