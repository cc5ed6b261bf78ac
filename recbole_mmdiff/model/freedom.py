"""FREEDOM: a frozen item graph and a denoised graph of users and items."""

import torch
from torch import Tensor

from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.diffusion import fold_in
from recbole_mmdiff.errors import at_least, share
from recbole_mmdiff.graph import bipartite_adjacency, propagate
from recbole_mmdiff.model.backbone import Backbone
from recbole_mmdiff.model.base import take
from recbole_mmdiff.model.item_graph import (
    grown_edges,
    item_graph,
    joined_graph,
    modality_weights,
    propagated_to_new,
)
from recbole_mmdiff.model.pairwise import Projected, Triples, Vectors, bpr_loss
from recbole_mmdiff.model.representations import Representations, lightgcn
from recbole_mmdiff.model.user_item_graph import distinct_edges, kept_edges


class FREEDOM(Backbone):
    """LightGCN on a denoised graph, and item vectors propagated over a frozen graph of similar items.

    The item graph S joins, with a weight for each modality, the graphs of every item and its
    ``knn_k`` most similar ones (itself among them) by the cosine of the raw features, each neighbour
    with the same weight. It is made once (frozen). h hat = S^L E. The graph of users and items is
    drawn anew for each epoch: ``1 - dropout`` of its edges, with probability 1 / sqrt(d_u d_i), so that
    popular ones go first, and normalised again; the whole graph serves for evaluation. h tilde is
    LightGCN's mean of layers on it. h_u = h tilde_u, h_i = h hat_i + h tilde_i.

    The loss is BPR, plus ``reg_weight`` times BPR of each modality's projected features against h_u.

    Deviations:
        - Features are frozen (``train_features: False``). The public toolbox trains the raw tables too,
          29 of the 31 million parameters on Amazon Baby, and lets the features of items drift from those
          of new ones; True does as it does. What it gains was not measured.
        - An item without a modality has no neighbours in its graph: its row is made of the modalities
          that it has.
        - The epoch's edges are drawn by (seed, epoch), so that a resumed run draws them again.
        - A user without a training row gets the mean vector of the others.
    """

    citation = ("Zhou and Shen: A Tale of Two Graphs: Freezing and Denoising Graph Structures for "
                "Multimodal Recommendation. ACM Multimedia 2023.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        for key in ("knn_k", "num_layers", "num_item_layers"):
            at_least(key, config[key], 1)
        share("dropout", config["dropout"], below_one=True)
        self.num_layers, self.num_item_layers = config["num_layers"], config["num_item_layers"]
        self.dropout, self.reg_weight = config["dropout"], config["reg_weight"]
        self.register_buffer("edges", distinct_edges(dataset), persistent=False)
        self.register_buffer("adjacency", self._adjacency(self.edges), persistent=False)
        self.knn_k = config["knn_k"]
        self.modality_weights = modality_weights(config["modality_weights"], self.features.names)
        graph, transposed = item_graph(self.features, self.knn_k, self.modality_weights, config["device"])
        self.register_buffer("item_graph", graph, persistent=False)
        self.register_buffer("item_graph_transposed", transposed, persistent=False)
        self.epoch_adjacency: Tensor | None = None

    def _adjacency(self, edges: Tensor) -> Tensor:
        return bipartite_adjacency(*edges, self.n_users, self.n_items)

    def outdate(self) -> None:
        """The epoch's graph goes, too; the next epoch makes another."""
        super().outdate()
        self.epoch_adjacency = None

    def before_epoch(self, epoch: int) -> None:
        """Draw the edges of the epoch."""
        if self.dropout:
            seed = fold_in(self.seed, epoch, 4)
            self.epoch_adjacency = self._adjacency(
                kept_edges(self.edges, self.n_users, self.n_items, self.dropout, seed))

    # ---- representations -----------------------------------------------------------------------

    def higher_items(self) -> Tensor:
        """h hat: (n_items, d), propagated over the graph of similar items."""
        higher = self.item_embedding.weight
        for _ in range(self.num_item_layers):
            higher = propagate(self.item_graph, higher, self.item_graph_transposed)
        return higher

    def higher_of_new_items(self, items: NewItems) -> Tensor:
        """(m, d): S^L E where each new item is one more row of S: itself, with the start vector 0, and its
        ``knn_k`` - 1 nearest items of the data set.

        Equal to what an item of the data set without rows has, but for the start vector of that, which is
        random and pushed away as a negative, and for the rows of other items in which it stands itself.
        """
        parts = grown_edges(items, self.features.names, self.knn_k)
        graph = joined_graph(parts, self.modality_weights, self.n_items + len(items))
        return propagated_to_new(graph, self.item_embedding.weight, self.num_item_layers)

    def collaborative_alone(self, start: Tensor) -> Tensor:
        """LightGCN's mean of layers, of which only the first is not 0."""
        return start / (self.num_layers + 1)

    def collaborative(self, items: Tensor) -> Representations:
        """h tilde of users and items, on the epoch's graph while training."""
        drawn = self.training and self.epoch_adjacency is not None
        adjacency = self.epoch_adjacency if drawn else self.adjacency
        return lightgcn(adjacency, self.user_embedding.weight, items, self.num_layers)

    # ---- the loss ------------------------------------------------------------------------------

    def auxiliary_loss(self, batch: Triples, vectors: Vectors) -> Tensor | float:
        """BPR of the projected features of each modality, ``reg_weight`` times their sum."""
        if not self.reg_weight:
            return 0.0
        projected = batch.projected
        if projected is None:
            items = torch.unique(batch.items())
            projected = Projected(items, self.features.project(items))
        place = torch.searchsorted(projected.items, batch.items())
        losses = [bpr_loss(vectors.users, take(features, place[:, 0]), take(features, place[:, 1:]))
                  for features in projected.features.unbind(1)]
        return self.reg_weight * sum(losses)
