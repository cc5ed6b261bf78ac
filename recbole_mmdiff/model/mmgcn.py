"""MMGCN: a graph of users and items for each modality."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.errors import at_least
from recbole_mmdiff.graph import propagate, transpose
from recbole_mmdiff.model.base import take
from recbole_mmdiff.model.item_features import ItemFeatures
from recbole_mmdiff.model.pairwise import PairwiseRecommender, Triples, Vectors, mean_square
from recbole_mmdiff.model.representations import Representations
from recbole_mmdiff.model.user_item_graph import training_adjacency


class MMGCN(PairwiseRecommender):
    """The tastes of users and the features of items, propagated for each modality apart.

    In a modality a node starts as x: a user as a learned preference, an item as its projected features,
    both of length 1. In each layer it receives h = leaky_relu(W mean of its neighbours' x) and becomes
    leaky_relu(G h + leaky_relu(V x) + id), where the id vector of the node is shared by modalities.
    A node's vector is the mean of its modalities' last layers. The loss is BPR, plus ``reg_weight`` times
    half the squared length of the id vectors and the preferences of a batch.

    Deviations:
        - Every modality has a projection to ``latent_size``; the public toolbox, and the paper, project
          long features alone, and to 256.
        - Preferences and id vectors are trained. In the public toolbox they are no parameters, and stay
          as they were drawn.
        - The combination adds (the paper's element-wise one); there is none by concatenation.
        - An item without a modality starts at zero in its graph.
        - A user without a training row gets the mean vector of the others.
    """

    citation = ("Wei, Wang, Nie, He, Hong and Chua: MMGCN: Multi-modal Graph Convolution Network for "
                "Personalized Recommendation of Micro-video. ACM Multimedia 2019.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        for key in ("num_layers", "latent_size"):
            at_least(key, config[key], 1)
        self.reg_weight, latent = config["reg_weight"], config["latent_size"]
        self.user_embedding, self.item_embedding = self.embedding(self.n_users), self.embedding(self.n_items)
        self.features = ItemFeatures(dataset, config["modalities"], config["modality_policy"], latent)
        self.preferences = nn.ModuleList(nn.Embedding(self.n_users, latent) for _ in self.features.names)
        for table in self.preferences:
            nn.init.xavier_normal_(table.weight)
        sizes = [latent] + [self.size] * (config["num_layers"] - 1)
        self.layers = nn.ModuleList(
            nn.ModuleList(ModalityLayer(size, self.size) for _ in self.features.names) for size in sizes)
        adjacency = training_adjacency(dataset, kind="random_walk")
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.register_buffer("adjacency_transposed", transpose(adjacency), persistent=False)

    def representations(self) -> Representations:
        """The vectors of all users and items, with gradient."""
        ids = torch.cat([self.user_embedding.weight, self.item_embedding.weight])
        parts = [functional.normalize(torch.cat([table.weight, items]), dim=-1) for table, items
                 in zip(self.preferences, self.features.project_all().unbind(1), strict=True)]
        for layers in self.layers:
            # One product for all modalities.
            received = propagate(self.adjacency, torch.cat(parts, 1), self.adjacency_transposed)
            told = received.chunk(len(parts), 1)
            parts = [layer(own, message, ids)
                     for layer, own, message in zip(layers, parts, told, strict=True)]
        return Representations(*(sum(parts) / len(parts)).split([self.n_users, self.n_items]))

    def auxiliary_loss(self, batch: Triples, vectors: Vectors) -> Tensor | float:
        """The penalty of id vectors and preferences."""
        if not self.reg_weight:
            return 0.0
        tables = [self.user_embedding, *self.preferences]
        return self.reg_weight * mean_square(*(take(table.weight, batch.users) for table in tables),
                                             take(self.item_embedding.weight, batch.items()))


class ModalityLayer(nn.Module):
    """A layer of one modality's graph, but for the mean over neighbours.

    Args:
        size_in: length of the vectors that come in.
        size: of those that go out, and of the id vectors.
    """

    def __init__(self, size_in: int, size: int):
        super().__init__()
        self.message = nn.Linear(size_in, size_in, bias=False)     # W
        self.joined = nn.Linear(size_in, size)                     # G
        self.own = nn.Linear(size_in, size)                        # V
        for layer in (self.message, self.joined, self.own):
            nn.init.xavier_normal_(layer.weight)

    def forward(self, nodes: Tensor, means: Tensor, ids: Tensor) -> Tensor:
        """(n, size): the next vectors of nodes (n, size_in), out of the means (n, size_in) of their
        neighbours and their id vectors (n, size)."""
        told = functional.leaky_relu(self.message(means))
        return functional.leaky_relu(self.joined(told) + functional.leaky_relu(self.own(nodes)) + ids)
