"""What the ranking models of one domain share: representations of all users and items, and the BPR loss."""

from typing import NamedTuple

import torch
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.ids import ids_with_rows
from recbole_mmdiff.errors import ConfigError, at_least
from recbole_mmdiff.model.base import Stage, StagedRecommender, take
from recbole_mmdiff.model.forgetful import Forgetful
from recbole_mmdiff.model.negative_sampling import Negatives, NegativeSampling
from recbole_mmdiff.model.representations import Representations


class Projected(NamedTuple):
    """Projected features (u, modalities, d) of distinct items (u,), in order of id."""

    items: Tensor
    features: Tensor


class Vectors(NamedTuple):
    """Of a batch: users (b, d), positive items (b, d), negatives (b, k, d)."""

    users: Tensor
    positives: Tensor
    negatives: Tensor


class Triples(NamedTuple):
    """A batch: users (b,), positive items (b,), negatives (b, k); and what has been projected of its
    items' features already, these and perhaps others."""

    users: Tensor
    positives: Tensor
    negatives: Negatives
    projected: Projected | None = None

    def items(self) -> Tensor:
        """(b, 1 + k): the positive item and the negative ones."""
        return torch.cat([self.positives[:, None], self.negatives.items], 1)

    def vectors(self, tables: Representations) -> Vectors:
        """The rows of ``tables``, and the mixed negatives where there are such."""
        users, mixed = take(tables.users, self.users), self.negatives.vectors
        if mixed is not None:
            return Vectors(users, take(tables.items, self.positives), mixed)
        # At once: each lookup has a gradient of the size of its table.
        items = take(tables.items, self.items())
        positives, negatives = items.split([1, items.shape[1] - 1], 1)
        return Vectors(users, positives[:, 0], negatives)


class PairwiseRecommender(Forgetful, StagedRecommender):
    """Base of models that score by inner products and learn to rank positive items above negative ones.

    A subclass implements ``representations``, and ``auxiliary_loss`` where its loss has more than BPR's.
    ``negative_sampler`` says how the ``num_negatives`` negatives of a positive are drawn. A user without
    a training row gets the mean vector of those who have one.

    Attributes:
        draws_negatives: False for a model whose loss takes positive rows alone.
    """

    input_type = InputType.PAIRWISE
    predicts_ratings = False
    reads_sampler = True
    domain_views = ("target",)      # The other domain's items have no features here.
    draws_negatives = True

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        at_least("embedding_size", config["embedding_size"], 1)
        at_least("reg_weight", config["reg_weight"] or 0, 0)
        if config["train_neg_ratio"]:
            raise ConfigError(f"train_neg_ratio: {config['model']} draws its own negatives; set "
                              f"num_negatives instead")
        self.size, self.epochs = config["embedding_size"], config["epochs"]
        self.negatives = NegativeSampling(config, dataset) if self.draws_negatives else None
        self.register_buffer("is_trained", ids_with_rows(dataset, dataset.uid_field), persistent=False)
        self._kept: list[Representations] = []

    def embedding(self, count: int) -> nn.Embedding:
        """A table (count, embedding_size), Xavier-uniform."""
        table = nn.Embedding(count, self.size)
        nn.init.xavier_uniform_(table.weight)
        return table

    def stages(self) -> list[Stage]:
        """One stage over the positive rows."""
        return [Stage("ranking", "target", (self.ranking_loss,), self.parameters(), self.epochs,
                      before_epoch=self.before_epoch, after_epoch=self.after_epoch)]

    def before_epoch(self, epoch: int) -> None:
        """What is made anew for each epoch of training."""

    def after_epoch(self, epoch: int) -> None:
        """What is inferred once the batches of an epoch are done."""

    # ---- the loss ------------------------------------------------------------------------------

    def representations(self) -> Representations:
        """The vectors of all users and items, with gradient."""
        raise NotImplementedError

    def ranking_loss(self, interaction) -> Tensor:
        """BPR of a batch of positive rows against the negatives that are drawn for them, and
        ``auxiliary_loss``."""
        return self.loss_of(interaction, self.representations())

    def loss_of(self, interaction, tables: Representations) -> Tensor:
        """``ranking_loss`` by the vectors of all users and items."""
        batch = self.triples(interaction, tables)
        vectors = batch.vectors(tables)
        return bpr_loss(*vectors) + self.auxiliary_loss(batch, vectors)

    def triples(self, interaction, tables: Representations) -> Triples:
        """The rows of a batch with negatives drawn by the sampler."""
        users, positives = interaction[self.USER_ID], interaction[self.ITEM_ID]
        negatives = self.negatives.draw(interaction, tables, self.seed, self.epoch)
        return Triples(users, positives, negatives)

    def auxiliary_loss(self, batch: Triples, vectors: Vectors) -> Tensor | float:
        """What a model adds to BPR's loss of a batch and its ``vectors``."""
        return 0.0

    # ---- scores --------------------------------------------------------------------------------

    def forget(self) -> None:
        """Representations are computed anew: weights have changed."""
        self._kept.clear()

    def train(self, mode: bool = True):
        self.forget()
        return super().train(mode)

    def _tables(self) -> Representations:
        """The vectors that score: users without a training row have the mean of the others'."""
        if self.training:
            return self._completed(self.representations())
        if not self._kept:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._kept.append(self._completed(self.representations()))
        return self._kept[0]

    def _completed(self, tables: Representations) -> Representations:
        mean = tables.users[self.is_trained].mean(0)
        return tables._replace(users=torch.where(self.is_trained[:, None], tables.users, mean))

    def user_factors(self, user: Tensor) -> Tensor:
        """(b, k): vectors of users (b,); without a training row, the mean of the others'."""
        return self._tables().users[user]

    def item_factors(self, item: Tensor) -> Tensor:
        """(b, k): vectors of items (b,)."""
        return self._tables().items[item]

    def item_offset(self, item: Tensor) -> Tensor:
        """(b,): 0."""
        return torch.zeros(len(item), device=item.device)


def bpr_loss(users: Tensor, positives: Tensor, negatives: Tensor, weights: Tensor | None = None) -> Tensor:
    """Bayesian personalised ranking (Rendle et al. 2009): mean of -log sigmoid(u p - u n), a scalar.

    Args:
        users, positives: (b, d).
        negatives: (b, k, d).
        weights: (k,) of the first to the last negative of each row; None weighs them alike, 1 / k.
    """
    margins = (users * positives).sum(-1, keepdim=True) - (users[:, None] * negatives).sum(-1)
    # Half precision would round differences of scores away.
    losses = functional.softplus(-margins.to(torch.promote_types(margins.dtype, torch.float32))).mean(0)
    return losses.mean() if weights is None else (losses * weights).sum()


def mean_square(*vectors: Tensor) -> Tensor:
    """Half the squared length of the vectors (..., d) of a batch, each kind averaged over its rows."""
    return sum(part.square().sum(-1).mean() for part in vectors) / 2
