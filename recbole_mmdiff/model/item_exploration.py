"""The item graph and the hypergraph of a domain, out of its items' modalities (SIEOUG, section 3.1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.modalities import item_modalities
from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.errors import at_least, in_words_of
from recbole_mmdiff.graph import (
    Edges,
    grown_neighbours,
    hypergraph_convolution,
    light_propagation,
    normalise,
    to_matrix,
    transpose,
)
from recbole_mmdiff.model.dual import DOMAINS
from recbole_mmdiff.model.item_features import modality_names
from recbole_mmdiff.transport import cluster_items, fuse_graphs


class ItemExploration(nn.Module):
    """Item vectors joined from three: of interactions, of similar items, of groups of items.

    Once, before training: the top ``knn_k`` of each modality by cosine, the item itself among them (Eqs. 1
    and 2), are fused by RISGF to the graph A (Eqs. 3 to 5), and its items are clustered by SISHE to gamma
    (n_items, ``num_clusters``) (Eqs. 6 to 10). Both stay as they are.

    Args:
        dataset: the training part of one domain.
        names: the modalities; None takes all of items that its folder holds.
        policy: of items without a row, as in ``item_modalities``.
        size: d, length of the vectors.
        num_layers: of both graphs.
        knn_k: z.
        graph_weight: mu of RISGF.
        num_clusters: K.
        cluster_weight: eta of SISHE.
        anneal_from: a larger eta that it begins with, or None.
        seed: of the clusters' start.
        device: on which the graphs are made.

    Raises:
        ConfigError: a value that is not accepted, or a domain without modalities.
        FeatureError, DataError: as ``item_modalities``.
    """

    def __init__(self, dataset, names: list[str] | None, policy: str, size: int, num_layers: int, *,
                 knn_k: int, graph_weight: float, num_clusters: int, cluster_weight: float,
                 anneal_from: float | None, seed: int, device: torch.device):
        super().__init__()
        for key, value in (("knn_k", knn_k), ("num_clusters", num_clusters), ("num_layers", num_layers)):
            at_least(key, value, 1)
        self.num_layers, self.knn_k, self.graph_weight = num_layers, knn_k, graph_weight
        self.names = modality_names(dataset, names)
        with torch.no_grad():
            modalities = {name: tuple(part.to(device) for part in parts)
                          for name, parts in item_modalities(dataset, self.names, policy).items()}
            fused, features = _fused_graph(modalities, dataset.item_num, knn_k, graph_weight)
            with in_words_of("num_clusters, cluster_weight, anneal_from"):
                gamma = _clusters(fused, features, num_clusters, eta=cluster_weight, anneal_from=anneal_from,
                                  seed=seed).cpu()
        count = dataset.item_num
        graph = to_matrix(normalise(fused, count, "symmetric"), (count, count)).cpu()
        self.register_buffer("item_graph", graph, persistent=False)
        self.register_buffer("item_graph_transposed", transpose(graph), persistent=False)
        # Saved: another device could find another of several good clusterings.
        self.register_buffer("gamma", gamma)
        self.weights = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(self.num_layers))
        for layer in self.weights:
            nn.init.eye_(layer.weight)
        self.attention = nn.Parameter(torch.zeros(3, size))

    def forward(self, start: Tensor, collaborative: Tensor) -> Tensor:
        """V (n_items, d) of the items' start vectors and of those of the graph of users and items, each
        (n_items, d) (Eqs. 12 to 15)."""
        similar = light_propagation(self.item_graph, start, self.num_layers, self.item_graph_transposed)
        return self._joined(collaborative, similar, self.grouped(start))

    def _joined(self, *parts: Tensor) -> Tensor:
        """(n, d): three vectors of each item, weighed by attention (Eqs. 14 and 15)."""
        parts = torch.stack(parts, 1)
        weights = (parts * self.attention).sum(-1, keepdim=True).softmax(1)
        return (weights * parts).sum(1)

    def grouped(self, vectors: Tensor) -> Tensor:
        """The mean over layers of the hypergraph's convolution (Eq. 13)."""
        total = vectors
        for layer in self.weights:
            vectors = layer(hypergraph_convolution(self.gamma, vectors))
            total = total + vectors
        return total / (self.num_layers + 1)

    def of_new_items(self, start: Tensor, items: NewItems) -> Tensor:
        """(m, d): V of items outside of the data set, without rows and with the start vector 0.

        Each is one more row of A, which RISGF fuses of its own top ``knn_k`` (entry by entry, so that the
        others stay), and is in the groups of its neighbours in A, each weighed by its entry. SISHE would put
        it nearly wholly into one of these: of a known item without rows, the part of similar items is the
        same but for its start vector, that of groups is near.

        Args:
            start: (n_items, d), of the data set's items.
            items: the others.
        """
        known, count = len(start), len(start) + len(items)
        fused, _ = _fused_graph({name: items.whole(name) for name in self.names}, known, self.knn_k,
                                self.graph_weight)
        graph = to_matrix(normalise(fused, count, "symmetric"), (count, count))
        vectors, gamma = (functional.pad(table, (0, 0, 0, len(items))) for table in (start, self.gamma))
        similar = light_propagation(graph, vectors, self.num_layers)[known:]
        votes = to_matrix(fused, (count, count)) @ gamma
        gamma = functional.normalize(votes[known:], p=1, dim=1)
        return self._joined(torch.zeros_like(similar), similar, self._grouped_new(start, gamma))

    def _grouped_new(self, vectors: Tensor, gamma: Tensor) -> Tensor:
        """(m, d): ``grouped`` of items with the start vector 0, in groups by ``gamma`` (m, K)."""
        total = vectors.new_zeros(len(gamma), vectors.shape[1])
        for layer in self.weights:
            total = total + layer(hypergraph_convolution(self.gamma, vectors, gamma))
            vectors = layer(hypergraph_convolution(self.gamma, vectors))
        return total / (self.num_layers + 1)


class ExploresItems:
    """Mixin, before the model's class, of models whose keys tell how items are explored."""

    @staticmethod
    def exploration_of(config, domain, size: int, num_layers: int) -> ItemExploration:
        """The module of the training part of one domain, for vectors of length ``size``.

        Raises:
            ConfigError, FeatureError, DataError: as ``ItemExploration``.
        """
        return ItemExploration(
            domain, config["modalities"], config["modality_policy"], size, num_layers,
            knn_k=config["knn_k"], graph_weight=config["graph_weight"],
            num_clusters=config["num_clusters"], cluster_weight=config["cluster_weight"],
            anneal_from=config["anneal_from"], seed=config["seed"], device=config["device"])


class MayExploreItems(ExploresItems):
    """The same of models of two domains that do without it, too (SIEOUG, Fig. 5).

    A subclass sets ``explorations``: by domain, as ``explorations_of`` makes them, or nothing at all. With
    nothing, no feature is read and no number drawn.
    """

    explorations: nn.ModuleDict

    def explorations_of(self, config, dataset, size: int, num_layers: int) -> nn.ModuleDict:
        """domain -> its module, of the training part of both domains.

        Raises:
            ConfigError: ``exploration_layers`` is below 1.
            ConfigError, FeatureError, DataError: as ``ItemExploration``.
        """
        at_least("exploration_layers", num_layers, 1)
        return nn.ModuleDict({name: self.exploration_of(config, domain, size, num_layers)
                              for name, domain in zip(DOMAINS, (dataset, dataset.source), strict=True)})

    def explored(self, name: str, items: Tensor) -> Tensor:
        """V (n_items, d) of a domain, out of the model's own vectors of its items, which are both the start
        and the collaborative part; without modules these vectors themselves."""
        return self.explorations[name](items, items) if self.explorations else items


def _fused_graph(modalities: dict[str, tuple[Tensor, Tensor]], count: int, knn_k: int, graph_weight: float
                 ) -> tuple[Edges, Tensor]:
    """The entries of A, and the features of all modalities side by side (n, d), each of length 1.

    Args:
        modalities: name -> features (n, dim), and which items lack them (n,).
        count: items from here on are new: nobody's neighbours.
    """
    graphs, present, features = [], [], []
    for values, missing in modalities.values():
        values = functional.normalize(values, dim=1)
        known = ~missing & (values != 0).any(1)
        known[0] = False
        graphs.append(grown_neighbours(values, count, knn_k, known))
        present.append(known)
        features.append(values)
    with in_words_of("graph_weight"):
        fused, _ = fuse_graphs(graphs, len(missing), graph_weight, present=torch.stack(present, 1))
    return fused, torch.cat(features, 1)


def _clusters(fused: Edges, features: Tensor, num_clusters: int, **keys) -> Tensor:
    """gamma (n_items, K) by ``cluster_items``; an item without an entry in the graph is in no cluster."""
    items, place = torch.unique(fused.rows, return_inverse=True)
    columns = torch.searchsorted(items, fused.columns)
    adjacency = to_matrix(Edges(place, columns, fused.values), (len(items), len(items)))
    found, _ = cluster_items(adjacency, num_clusters, features=features[items], **keys)
    gamma = found.new_zeros(len(features), num_clusters)
    gamma[items] = found
    return gamma
