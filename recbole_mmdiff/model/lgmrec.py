"""LGMRec: graphs of ids and of modalities, and hyperedges that modalities learn to belong to."""

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional

from recbole_mmdiff.diffusion import fold_in, keyed_uniform
from recbole_mmdiff.errors import at_least, share
from recbole_mmdiff.graph import mean_of_items, propagate, propagated_layers, transpose
from recbole_mmdiff.model.base import take
from recbole_mmdiff.model.item_features import ItemFeatures
from recbole_mmdiff.model.pairwise import PairwiseRecommender, Triples, Vectors, mean_square
from recbole_mmdiff.model.representations import Representations, lightgcn
from recbole_mmdiff.model.user_item_graph import training_adjacency

_EDGES, _DROPPED = range(30, 32)


class LGMRec(PairwiseRecommender):
    """Local graphs for what is near, hypergraphs for what users and items have in common at large.

    Local: LightGCN on ids, and for each modality the items' projected features and the mean of each
    user's, after ``num_modality_layers`` propagations, at length 1. Global: in a modality an item belongs to
    ``num_hyperedges`` hyperedges as a linear map of its features says, a user as the sum over his items;
    both by a Gumbel softmax of temperature ``edge_temperature``. LightGCN's item vectors go to the
    hyperedges, and from there to items and users, ``num_hyper_layers`` times. What scores is the local part
    plus ``global_weight`` times the global one, summed over modalities, at length 1.

    The loss is BPR, plus ``contrast_weight`` times InfoNCE between each two modalities' global vectors, for
    users and for items, plus ``reg_weight`` times half the squared length of the batch's vectors.

    Deviations:
        - InfoNCE is over the users, and the positive items, of the batch. The public code sets each against
          all users and all items, b x n numbers.
        - In evaluation hyperedges have no Gumbel noise; the public code draws some then, too.
        - An item without a modality has zero features there, and belongs to no hyperedge of it.
        - Features are frozen. Noise and dropout are drawn by (seed, epoch, batch).
        - A user without a training row gets the mean vector of the others.
    """

    citation = ("Guo, Li, Li, Wang, Shi and Ruan: LGMRec: Local and Global Graph Learning for Multimodal "
                "Recommendation. AAAI 2024.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self._global: tuple[Tensor, ...] | list[Tensor] = ()
        for key in ("num_layers", "num_modality_layers", "num_hyper_layers", "num_hyperedges"):
            at_least(key, config[key], 1)
        for key in ("global_weight", "contrast_weight"):
            at_least(key, config[key], 0)
        for key in ("edge_temperature", "contrast_temperature"):
            at_least(key, config[key], 1e-6)
        share("dropout_prob", config["dropout_prob"], below_one=True)
        self.num_layers, self.num_modality_layers = config["num_layers"], config["num_modality_layers"]
        self.num_hyper_layers, self.num_hyperedges = config["num_hyper_layers"], config["num_hyperedges"]
        self.global_weight, self.contrast_weight = config["global_weight"], config["contrast_weight"]
        self.edge_temperature, self.dropout = config["edge_temperature"], config["dropout_prob"]
        self.contrast_temperature, self.reg_weight = config["contrast_temperature"], config["reg_weight"]
        self.user_embedding = self.embedding(self.n_users)
        self.item_embedding = self.embedding(self.n_items)
        # A projection's last numbers are the scores of the hyperedges.
        self.features = ItemFeatures(dataset, config["modalities"], config["modality_policy"],
                                     self.size + self.num_hyperedges)
        self.register_buffer("adjacency", training_adjacency(dataset), persistent=False)
        users, items = (dataset.inter_feat[field] for field in (dataset.uid_field, dataset.iid_field))
        mean = mean_of_items(users, items, self.n_users, self.n_items)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("mean_transposed", transpose(mean), persistent=False)
        self.register_buffer("degree", mean.crow_indices().diff()[:, None].float(), persistent=False)
        self.batch = 0

    def forget(self) -> None:
        """The hypergraphs' vectors go, too."""
        super().forget()
        self._global = ()

    def before_epoch(self, epoch: int) -> None:
        """Batches are counted anew."""
        self.batch = 0

    # ---- representations -----------------------------------------------------------------------

    def representations(self) -> Representations:
        """The vectors of all users and items, with gradient; the global ones stay for the loss."""
        ids = lightgcn(self.adjacency, self.user_embedding.weight, self.item_embedding.weight,
                       self.num_layers)
        vectors, parts = torch.cat([ids.users, ids.items]), []
        for number, projected in enumerate(self.features.project_all().unbind(1)):
            features, scores = projected.split([self.size, self.num_hyperedges], 1)
            vectors = vectors + functional.normalize(self._near(features), dim=-1)
            parts.append(self._far(ids.items, scores, number))
        self.batch += self.training
        self._global = parts if self.training else ()
        vectors = vectors + self.global_weight * functional.normalize(sum(parts), dim=-1)
        return Representations(*vectors.split([self.n_users, self.n_items]))

    def _near(self, features: Tensor) -> Tensor:
        """(n_users + n_items, d): features (n_items, d) and the users' means of them, propagated."""
        users = propagate(self.mean, features, self.mean_transposed)
        return propagated_layers(self.adjacency, torch.cat([users, features]), self.num_modality_layers)[-1]

    def _far(self, items: Tensor, scores: Tensor, number: int) -> Tensor:
        """(n_users + n_items, d): vectors of items (n_items, d) by way of the hyperedges of a modality, of
        which items have ``scores`` (n_items, h)."""
        present = self.features.present[:, number, None]
        users = self.degree * propagate(self.mean, scores, self.mean_transposed)
        edges = self._memberships(torch.cat([users, scores]), number)
        of_users, of_items = edges.split([self.n_users, self.n_items])
        of_items = of_items * present
        for _ in range(self.num_hyper_layers):
            gathered = of_items.T @ items
            items, users = of_items @ gathered, of_users @ gathered
        return torch.cat([users, items])

    def _memberships(self, scores: Tensor, number: int) -> Tensor:
        """A softmax over the hyperedges (n, h); while training of noisy scores, and with dropout."""
        if not self.training:
            return (scores / self.edge_temperature).softmax(1)
        nodes, count = torch.arange(len(scores), device=scores.device), self.num_hyperedges
        uniforms = keyed_uniform(nodes, count, self._seed(_EDGES, number), torch.float64)
        noise = -torch.log(-torch.log(uniforms.clamp(1e-12, 1 - 1e-12)))
        edges = ((scores + noise.to(scores.dtype)) / self.edge_temperature).softmax(1)
        kept = keyed_uniform(nodes, count, self._seed(_DROPPED, number)) >= self.dropout
        return edges * kept / (1 - self.dropout)

    def _seed(self, purpose: int, number: int) -> int:
        return fold_in(self.seed, self.epoch, purpose, self.batch, number)

    # ---- the loss ------------------------------------------------------------------------------

    def auxiliary_loss(self, batch: Triples, vectors: Vectors) -> Tensor | float:
        """InfoNCE between modalities, and the penalty."""
        parts, self._global = self._global, ()
        loss = self.reg_weight * mean_square(*vectors)
        if not self.contrast_weight:
            return loss
        for nodes in (torch.unique(batch.users), self.n_users + torch.unique(batch.positives)):
            views = [functional.normalize(take(part, nodes), dim=-1) for part in parts]
            for one, other in combinations(views, 2):
                scores = one @ other.T / self.contrast_temperature
                same = torch.arange(len(nodes), device=scores.device)
                loss = loss + self.contrast_weight * functional.cross_entropy(scores, same)
        return loss
