"""The vectors of all users and items of a model that scores by inner products."""

from typing import NamedTuple

import torch
from torch import Tensor

from recbole_mmdiff.graph import propagated_layers


class Representations(NamedTuple):
    """What a model knows of everybody.

    Attributes:
        users: (n_users, d).
        items: (n_items, d).
        layers: (n_items, d) each, of which ``items`` is the mean: what MixGCF's hops mix.
    """

    users: Tensor
    items: Tensor
    layers: tuple[Tensor, ...] = ()


def lightgcn(adjacency: Tensor, users: Tensor, items: Tensor, num_layers: int,
             transposed: Tensor | None = None) -> Representations:
    """LightGCN's vectors out of start vectors of users (n_users, d) and items (n_items, d); ``transposed``
    as ``propagate`` takes it."""
    return mean_of_layers(
        propagated_layers(adjacency, torch.cat([users, items]), num_layers, transposed), len(users))


def mean_of_layers(layers: list[Tensor], num_users: int) -> Representations:
    """The mean of layers (n_users + n_items, d), and the items' part of each."""
    mean = sum(layers[1:], start=layers[0]) / len(layers)
    # The gradient of a split is one table; that of two slices would be two, mostly zero, and their sum.
    users, items = mean.split([num_users, len(mean) - num_users])
    return Representations(users, items, tuple(layer[num_users:] for layer in layers))
