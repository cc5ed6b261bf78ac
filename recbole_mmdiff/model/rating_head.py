"""How vectors of users and items become ratings."""

import torch
from torch import Tensor, nn

from recbole_mmdiff.model.bias import shrunken_item_biases


class RatingHead(nn.Module):
    """r = <z, v>, or with biases mu + b_i + <w, z> + <z, v>, of users z and items v (b, k).

    mu is the mean of the training ratings; b_i the shrunken mean of what is left of an item's, plus
    a learned correction; <w, z> the user's bias, read from z so that it crosses domains with z.

    Args:
        dataset: of the target domain, its training rows.
        rating_field: the column of ratings.
        size: k.
        biases: whether there are biases.
        item_damping: how many ratings at the mean every item is given in b_i.
    """

    def __init__(self, dataset, rating_field: str, size: int, biases: bool, item_damping: float):
        super().__init__()
        self.biases = biases
        mean, item_bias, _ = shrunken_item_biases(dataset, rating_field, item_damping)
        self.register_buffer("mean", mean.float() * biases)
        self.register_buffer("item_mean", item_bias.float() * biases)
        if biases:
            self.item_bias = nn.Embedding(dataset.item_num, 1)
            nn.init.zeros_(self.item_bias.weight)
            self.user_bias = nn.Linear(size, 1, bias=False)

    def user_factors(self, vectors: Tensor) -> Tensor:
        """(b, k) or (b, k + 1): z, or [z, <w, z>]."""
        return torch.cat([vectors, self.user_bias(vectors)], -1) if self.biases else vectors

    def item_factors(self, vectors: Tensor) -> Tensor:
        """(b, k) or (b, k + 1): v, or [v, 1]."""
        return nn.functional.pad(vectors, (0, 1), value=1.0) if self.biases else vectors

    def item_offset(self, item: Tensor, rated: Tensor | None = None) -> Tensor:
        """(b,): 0, or mu + b_i, of items (b,); b_i of those that are not ``rated`` (b,) is left out."""
        if not self.biases:
            return self.mean.expand(len(item))
        bias = self.item_mean[item] + self.item_bias(item).squeeze(-1)
        return self.mean + (bias if rated is None else bias * rated)
