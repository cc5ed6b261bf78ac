"""LATTICE: item vectors propagated over a graph that is learned with the features' projections."""

import torch
from torch import Tensor
from torch.nn import functional

from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.errors import at_least, share
from recbole_mmdiff.graph import (
    Edges,
    propagate,
    to_matrix,
    transpose,
    weighted_product,
)
from recbole_mmdiff.model.backbone import Backbone
from recbole_mmdiff.model.item_graph import LatentGraph, propagated_to_new
from recbole_mmdiff.model.pairwise import Triples, Vectors, mean_square
from recbole_mmdiff.model.representations import Representations, lightgcn
from recbole_mmdiff.model.user_item_graph import training_adjacency


class LATTICE(Backbone):
    """LightGCN, and item vectors propagated over a latent graph of similar items.

    For each modality m, S^m holds every item's ``knn_k`` most similar ones by the cosine of the raw
    features, and S~^m those by the cosine of their learned projections h^m (Eq. 1, 2, 4, 5); both are
    normalised, D^-1/2 S D^-1/2 (Eq. 3). A = sum_m alpha_m (lambda S^m + (1 - lambda) S~^m), with
    alpha a softmax of learned weights and lambda = ``original_share`` (Eq. 6, 7). h = A^L E, and an
    item's vector is LightGCN's plus h / |h| (Eq. 8, 11). LightGCN is the mean of ``num_layers`` + 1
    layers over D^-1 (A + I), the graph of users and items with self loops.

    A is built in the first batch of an epoch, with a gradient for projections and alpha, and is a
    constant for the rest of it; in evaluation it is built of the weights as they are. The loss is BPR,
    plus ``reg_weight`` times half the squared length of the batch's vectors.

    Deviations:
        - A modality's two graphs are normalised each, and then mixed, as in the paper. The public
          toolbox mixes the learned graphs of all modalities first, and normalises their sum.
        - Graphs hold their edges only. The toolbox holds dense matrices of items x items.
        - An item without a modality has no neighbours in its graphs: its row is made of the modalities
          that it has.
        - Features are frozen (``train_features: False``); the toolbox trains the raw tables, too, but
          reads them in one batch of an epoch only.
        - The learning rate is constant. The toolbox lowers it by 4% every 50 epochs.
        - With ``mirror_interval``, projections and alpha step down only, as the graph is a constant in
          the step up.
        - A user without a training row gets the mean vector of the others.
    """

    citation = "Zhang et al.: Mining Latent Structures for Multimedia Recommendation. ACM Multimedia 2021."

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        for key in ("knn_k", "num_layers", "num_item_layers"):
            at_least(key, config[key], 1)
        share("original_share", config["original_share"])
        self.num_layers, self.num_item_layers = config["num_layers"], config["num_item_layers"]
        self.reg_weight = config["reg_weight"]
        adjacency = training_adjacency(dataset, self_loops=True, kind="random_walk")
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.register_buffer("adjacency_transposed", transpose(adjacency), persistent=False)
        self.latent_graph = LatentGraph(self.features, config["knn_k"], config["original_share"],
                                        config["device"])
        self._item_graph: tuple[Tensor, Tensor] | None = None

    def forget(self) -> None:
        """The learned graph goes with the weights it was built of."""
        super().forget()
        self._item_graph = None

    def before_epoch(self, epoch: int) -> None:
        """The first batch builds the graph anew."""
        self.forget()

    # ---- representations -----------------------------------------------------------------------

    def higher_items(self) -> Tensor:
        """h: (n_items, d), propagated over the latent graph."""
        higher = self.item_embedding.weight
        if self.training and torch.is_grad_enabled() and self._item_graph is None:
            edges = self.latent_graph(self.features)
            for _ in range(self.num_item_layers):
                higher = weighted_product(edges, higher, self.n_items)
            self._keep(edges)
            return higher
        if self._item_graph is None:
            with torch.no_grad():
                self._keep(self.latent_graph(self.features))
        for _ in range(self.num_item_layers):
            higher = propagate(self._item_graph[0], higher, self._item_graph[1])
        return higher

    def _keep(self, edges: Edges) -> None:
        matrix = to_matrix(edges, (self.n_items, self.n_items))
        self._item_graph = matrix, transpose(matrix)

    def higher_of_new_items(self, items: NewItems) -> Tensor:
        """(m, d): A^L E where each new item is one more row of A, as in FREEDOM; A's learned part compares
        the projections of its features."""
        edges = self.latent_graph.grown(self.features, items)
        graph = to_matrix(edges, (self.n_items + len(items),) * 2)
        return propagated_to_new(graph, self.item_embedding.weight, self.num_item_layers)

    def collaborative_alone(self, start: Tensor) -> Tensor:
        """An item without rows has itself alone as a neighbour."""
        return start

    def collaborative(self, items: Tensor) -> Representations:
        """LightGCN's users and items."""
        return lightgcn(self.adjacency, self.user_embedding.weight, items, self.num_layers,
                        self.adjacency_transposed)

    def join(self, collaborative: Representations, higher: Tensor) -> Representations:
        """Items get ``higher`` at length 1 (Eq. 11)."""
        return super().join(collaborative, functional.normalize(higher, dim=-1))

    # ---- the loss ------------------------------------------------------------------------------

    def auxiliary_loss(self, batch: Triples, vectors: Vectors) -> Tensor | float:
        """``reg_weight`` times half the squared length of the batch's vectors."""
        return self.reg_weight * mean_square(*vectors) if self.reg_weight else 0.0
