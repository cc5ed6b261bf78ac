"""Graphs of similar items out of the features that a model holds."""

import torch
from torch import Tensor, nn

from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.graph import (
    Edges,
    mix,
    nearest_neighbours,
    normalise,
    similarities,
    to_matrix,
    transpose,
)
from recbole_mmdiff.model.item_features import ItemFeatures


def modality_weights(given: dict | None, names: list[str]) -> list[float]:
    """What the key ``modality_weights`` gives ``names``, in their order; a modality that it does not
    name weighs 1.

    Raises:
        ConfigError: no mapping of names to positive numbers.
    """
    given = given or {}
    if not isinstance(given, dict) or any(not isinstance(value, (int, float)) or value <= 0
                                          for value in given.values()):
        raise ConfigError(f"modality_weights: {given!r} is no mapping of modalities to positive numbers, "
                          f"write for instance {{image: 0.1, text: 0.9}}")
    return [float(given.get(name, 1.0)) for name in names]


def raw_edges(features: ItemFeatures, knn_k: int, device: torch.device) -> list[Edges]:
    """For each modality every item and its ``knn_k`` most similar ones by the raw features' cosine, found on
    ``device``, where a model goes only once it is built."""
    found = [nearest_neighbours(features.table(number).detach().to(device), knn_k,
                                features.present[:, number].to(device))
             for number in range(len(features.names))]
    return [Edges(*(part.to(features.present.device) for part in edges)) for edges in found]


@torch.no_grad()
def item_graph(features: ItemFeatures, knn_k: int, weights: list[float], device: torch.device
               ) -> tuple[Tensor, Tensor]:
    """FREEDOM's frozen graph: equal weights for an item's neighbours, modalities joined by ``weights``
    (of those that the item has): CSR (n_items, n_items) and its transpose. Neighbours are found on
    ``device``."""
    count = len(features.present)
    parts = [normalise(edges._replace(values=torch.ones_like(edges.values)), count, "random_walk")
             for edges in raw_edges(features, knn_k, device)]
    matrix = to_matrix(mix(parts, weights, count, present=True), (count, count))
    return matrix, transpose(matrix)


class LatentGraph(nn.Module):
    """LATTICE's graph: of each modality the graph of the raw features and that of their projections.

    Both hold every item and its ``knn_k`` most similar ones with their cosine, normalised
    symmetrically. The modalities are mixed by a softmax of learned weights, over those that an item
    has.

    Args:
        features: what the graph of the raw features, which stays as it is, is made of.
        knn_k: neighbours of an item, itself among them.
        original_share: weight of the raw features' graph; that of the projections' is the rest.
        device: where the raw features' neighbours are found.
    """

    def __init__(self, features: ItemFeatures, knn_k: int, original_share: float, device: torch.device):
        super().__init__()
        self.knn_k, self.original_share = knn_k, original_share
        self.modality_logits = nn.Parameter(torch.zeros(len(features.names)))
        for number, edges in enumerate(raw_edges(features, knn_k, device)):
            rows, columns, values = normalise(edges, len(features.present), "symmetric")
            self.register_buffer(f"pairs_{number}", torch.stack([rows, columns]), persistent=False)
            self.register_buffer(f"values_{number}", values, persistent=False)

    def forward(self, features: ItemFeatures) -> Edges:
        """The edges of the (n_items, n_items) matrix, with a gradient for projections and weights."""
        numbers, count = range(len(features.names)), len(features.present)
        # The same graph as in evaluation, which has no autocast.
        with torch.autocast(features.present.device.type, enabled=False):
            projected = features.project_all()
            learned = [self._learned(projected[:, number], features.present[:, number])
                       for number in numbers]
            raw = [Edges(*getattr(self, f"pairs_{number}"), getattr(self, f"values_{number}"))
                   for number in numbers]
            weights = self.modality_logits.softmax(0)
            weights = torch.cat([self.original_share * weights, (1 - self.original_share) * weights])
            return mix([*raw, *learned], weights, count, present=True)

    def _learned(self, projected: Tensor, present: Tensor) -> Edges:
        edges = nearest_neighbours(projected, self.knn_k, present)
        edges = edges._replace(values=similarities(projected, edges))
        return normalise(edges, len(present), "symmetric")
