"""BM3: bootstrapped latent representations of users, items and modalities, without negatives."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.loaders import SAMPLE_ID
from recbole_mmdiff.diffusion import fold_in, keyed_uniform
from recbole_mmdiff.errors import at_least, share
from recbole_mmdiff.graph import light_propagation
from recbole_mmdiff.model.base import take
from recbole_mmdiff.model.item_features import ItemFeatures
from recbole_mmdiff.model.representations import Representations
from recbole_mmdiff.model.user_item_graph import training_adjacency
from recbole_mmdiff.model.without_negatives import WithoutNegatives


class BM3(WithoutNegatives):
    """Each vector predicts the other side's, of which a part is dropped out.

    h_u is LightGCN's mean of layers, h_i that of the item plus its start vector, h_m the projected features
    of a modality. With dropout (sg: no gradient) and a linear predictor f, C(a, b) = -cos(a, b):

        graph reconstruction     C(f(h_u), sg dropout(h_i)) + C(f(h_i), sg dropout(h_u))
        inter-modality           C(f(h_m), sg dropout(h_i)), summed over modalities
        intra-modality           C(f(h_m), sg dropout(h_m)), summed over modalities

    The loss is the first, plus ``cl_weight`` times the others, plus ``reg_weight`` times the lengths (the
    root of the sum of squares) of the tables of all h_u and all h_i, divided by the number of items. Scores
    are <f(h_u), f(h_i)>.

    Deviations:
        - The predictor starts as the identity. From a random start it may come to turn a part of the space
          around (negative eigenvalues): users and their items then lie on opposite sides there, which f
          makes up for in the losses, but not in the scores, where f stands on both sides. On the data we
          have Recall@20 fell to 0 in such a run.
        - The losses are 1 - cos instead of -cos, which is the same but for a constant.
        - The penalty is the public toolbox's, the same for every user and every item. The paper's squared
          length of h_u and h_i, in a batch, falls on those most that stand in many rows. The losses ask
          nothing of a vector's length, but the scores do: popular items had the shortest vectors.
        - The two losses of a modality are averaged over the rows whose item has it.
        - Features are frozen (``train_features: False``); the public toolbox trains them.
        - Dropout is drawn by (seed, epoch, sample), for each row of a batch anew.
        - A user without a training row gets the mean vector of the others.
    """

    citation = ("Zhou, Zhou, Liu, Zeng, Miao, Wang, You and Jiang: Bootstrap Latent Representations for "
                "Multi-modal Recommendation. WWW 2023.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        at_least("num_layers", config["num_layers"], 0)
        share("dropout", config["dropout"], below_one=True)
        self.num_layers, self.dropout = config["num_layers"], config["dropout"]
        self.cl_weight, self.reg_weight = config["cl_weight"], config["reg_weight"]
        self.user_embedding, self.item_embedding = self.embedding(self.n_users), self.embedding(self.n_items)
        self.predictor = nn.Linear(self.size, self.size)
        nn.init.eye_(self.predictor.weight)
        nn.init.zeros_(self.predictor.bias)
        self.features = ItemFeatures(dataset, config["modalities"], config["modality_policy"], self.size,
                                     config["train_features"])
        self.register_buffer("adjacency", training_adjacency(dataset), persistent=False)

    def online(self) -> Representations:
        """h_u and h_i of all users and items."""
        start = torch.cat([self.user_embedding.weight, self.item_embedding.weight])
        users, items = light_propagation(self.adjacency, start, self.num_layers).split(
            [self.n_users, self.n_items])
        return Representations(users, items + self.item_embedding.weight)

    def representations(self) -> Representations:
        """f(h_u) and f(h_i) of all users and items."""
        return Representations(*(self.predictor(part) for part in self.online()[:2]))

    # ---- the loss ------------------------------------------------------------------------------

    def ranking_loss(self, interaction) -> Tensor:
        """The losses of a batch of positive rows."""
        samples, items = interaction[SAMPLE_ID], interaction[self.ITEM_ID]
        tables = self.online()
        h_u, h_i = take(tables.users, interaction[self.USER_ID]), take(tables.items, items)
        of_users, of_items = self._dropped(h_u, samples, 0), self._dropped(h_i, samples, 1)
        loss = (distance(self.predictor(h_u), of_items) + distance(self.predictor(h_i), of_users)).mean()
        if self.cl_weight:
            loss = loss + self.cl_weight * self._modality_losses(items, samples, of_items)
        lengths = tables.users.square().sum().sqrt() + tables.items.square().sum().sqrt()
        return loss + self.reg_weight * lengths / self.n_items

    def _modality_losses(self, items: Tensor, samples: Tensor, of_items: Tensor) -> Tensor:
        """Inter- and intra-modality losses of the items (b,) of a batch, summed over modalities."""
        distinct, place = torch.unique(items, return_inverse=True)
        projected = self.features.project(distinct)
        losses = []
        for number, features in enumerate(projected.unbind(1)):
            has = self.features.present[items, number]
            target = self._dropped(take(features, place), samples, 2 + number)
            predicted = take(self.predictor(features), place)
            found = distance(predicted, of_items) + distance(predicted, target)
            losses.append((found * has).sum() / has.sum().clamp(min=1))
        return sum(losses)

    def _dropped(self, vectors: Tensor, samples: Tensor, purpose: int) -> Tensor:
        """Vectors (b, d) of samples (b,) without a part of their numbers, and without gradient."""
        vectors = vectors.detach()
        seed = fold_in(self.seed, self.epoch, purpose)
        kept = keyed_uniform(samples, vectors.shape[1], seed) >= self.dropout
        return vectors * kept / (1 - self.dropout)


def distance(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - cos of each row of two tensors (b, d): (b,); always in float32 at least."""
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return 1 - functional.cosine_similarity(predicted.to(dtype), target.to(dtype), dim=-1)
