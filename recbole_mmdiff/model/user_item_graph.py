"""The graph of users and items that a part holds, and the edges that an epoch keeps."""

import torch
from recbole.data.dataset import Dataset
from torch import Tensor

from recbole_mmdiff.diffusion import keyed_uniform
from recbole_mmdiff.graph import bipartite_adjacency, keep_by_degree


def training_adjacency(dataset: Dataset, **form) -> Tensor:
    """The normalised adjacency of the users and items of a part, in the ``form`` that
    ``bipartite_adjacency`` takes: CSR (n_users + n_items, n_users + n_items)."""
    rows = dataset.inter_feat
    return bipartite_adjacency(rows[dataset.uid_field], rows[dataset.iid_field], dataset.user_num,
                               dataset.item_num, **form)


def distinct_edges(dataset: Dataset) -> Tensor:
    """(2, e): users and items of the rows of a part, every pair once."""
    rows = dataset.inter_feat
    return torch.unique(torch.stack([rows[dataset.uid_field], rows[dataset.iid_field]]), dim=1)


def kept_edges(edges: Tensor, num_users: int, num_items: int, dropout: float, seed: int) -> Tensor:
    """(2, kept): ``1 - dropout`` of edges (2, e), kept with probability 1 / sqrt(d_u d_i) (FREEDOM)."""
    if not dropout:
        return edges
    places = torch.arange(edges.shape[1], device=edges.device)
    uniforms = keyed_uniform(places, 1, seed, torch.float64)[:, 0]
    return edges[:, keep_by_degree(*edges, num_users, num_items, 1 - dropout, uniforms)]
