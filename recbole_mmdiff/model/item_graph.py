"""Graphs of similar items out of the features that a model holds."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.graph import (
    Edges,
    grown_neighbours,
    mix,
    nearest_neighbours,
    normalise,
    propagate,
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


def grown_edges(items: NewItems, names: list[str], knn_k: int) -> list[Edges]:
    """``raw_edges`` over the data set's items and ``items`` behind them, which are nobody's neighbours."""
    count, found = len(items.known[names[0]][0]), []
    for name in names:
        values, missing = items.whole(name)
        found.append(grown_neighbours(values, count, knn_k, items.present(missing)))
    return found


@torch.no_grad()
def item_graph(features: ItemFeatures, knn_k: int, weights: list[float], device: torch.device
               ) -> tuple[Tensor, Tensor]:
    """FREEDOM's frozen graph: equal weights for an item's neighbours, modalities joined by ``weights``
    (of those that the item has): CSR (n_items, n_items) and its transpose. Neighbours are found on
    ``device``."""
    count = len(features.present)
    matrix = joined_graph(raw_edges(features, knn_k, device), weights, count)
    return matrix, transpose(matrix)


def joined_graph(parts: list[Edges], weights: list[float], count: int) -> Tensor:
    """CSR (count, count): equal weights for an item's neighbours, modalities joined by ``weights``."""
    parts = [normalise(edges._replace(values=torch.ones_like(edges.values)), count, "random_walk")
             for edges in parts]
    return to_matrix(mix(parts, weights, count, present=True), (count, count))


def propagated_to_new(graph: Tensor, start: Tensor, num_layers: int) -> Tensor:
    """(m, d): the last layer of the items behind the data set's, whose start vectors are 0.

    Args:
        graph: CSR (n + m, n + m).
        start: (n, d) of the data set's items.
    """
    vectors = functional.pad(start, (0, 0, 0, graph.shape[0] - len(start)))
    for _ in range(num_layers):
        vectors = propagate(graph, vectors)
    return vectors[len(start):]


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
        numbers = range(len(features.names))
        # The same graph as in evaluation, which has no autocast.
        with torch.autocast(features.present.device.type, enabled=False):
            projected = features.project_all()
            learned = [nearest_neighbours(projected[:, number], self.knn_k, features.present[:, number])
                       for number in numbers]
            raw = [Edges(*getattr(self, f"pairs_{number}"), getattr(self, f"values_{number}"))
                   for number in numbers]
            return self._mixed(raw, learned, projected)

    def grown(self, features: ItemFeatures, items: NewItems) -> Edges:
        """The same of the data set's items and ``items`` behind them, (n_items + m, n_items + m): each comes
        into the graph alone, as nobody's neighbour, and all other rows stay as they are."""
        raw = grown_edges(items, features.names, self.knn_k)
        projected = torch.cat([features.project_all(), features.project_new(items)])
        count, present = len(features.present), torch.cat([features.present, features.present_of(items)])
        raw = [normalise(edges, len(projected), "symmetric") for edges in raw]
        learned = [grown_neighbours(projected[:, number], count, self.knn_k, present[:, number])
                   for number in range(len(features.names))]
        return self._mixed(raw, learned, projected)

    def _mixed(self, raw: list[Edges], learned: list[Edges], projected: Tensor) -> Edges:
        """Both kinds of graphs, of n items each: ``raw`` normalised, ``learned`` as neighbours among
        ``projected`` (n, modalities, d)."""
        count = len(projected)
        learned = [normalise(edges._replace(values=similarities(projected[:, number], edges)), count,
                             "symmetric") for number, edges in enumerate(learned)]
        weights = self.modality_logits.softmax(0)
        weights = torch.cat([self.original_share * weights, (1 - self.original_share) * weights])
        return mix([*raw, *learned], weights, count, present=True)
