"""What the dual-target ranking models share: positive rows against sampled items, in both domains."""

import torch
from torch import Tensor
from torch.nn import functional

from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.base import Stage, StagedRecommender
from recbole_mmdiff.model.forgetful import Forgetful
from recbole_mmdiff.model.representations import Representations

DOMAINS = ("target", "source")


class DualVectors(Forgetful):
    """Mixin, before the model's class, of models that score by inner products in both domains.

    A subclass implements ``scoring_vectors``; they are kept until weights change.
    """

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self._kept: dict[str, Representations] = {}

    def scoring_vectors(self) -> dict[str, Representations]:
        """domain -> the vectors of all users and items that score in it."""
        raise NotImplementedError

    def vectors_of(self, name: str) -> Representations:
        """``scoring_vectors`` of a domain, without a gradient."""
        if self.training:
            self.forget()
        if not self._kept:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._kept.update(self.scoring_vectors())
        return self._kept[name]

    def forget(self) -> None:
        """Vectors are computed anew: weights have changed."""
        self._kept.clear()

    def train(self, mode: bool = True):
        self.forget()
        return super().train(mode)

    def user_factors(self, user: Tensor) -> Tensor:
        """(b, d): target vectors of users (b,)."""
        return self.vectors_of("target").users[user]

    def item_factors(self, item: Tensor) -> Tensor:
        """(b, d): vectors of target items (b,)."""
        return self.vectors_of("target").items[item]

    def item_offset(self, item: Tensor) -> Tensor:
        """(b,): 0."""
        return torch.zeros(len(item), device=item.device)


class DualRankingRecommender(StagedRecommender):
    """Base of models that learn to rank in both domains at once.

    One stage iterates the training rows of both domains in step, each row with ``train_neg_ratio``
    sampled items. A subclass implements ``ranking_loss`` and ``finetuning_scores``.
    """

    needs_source = True
    predicts_ratings = False
    domain_views = ("target",)

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.epochs, self.reg_weight = config["epochs"], config["reg_weight"]
        if not config["train_neg_ratio"]:
            raise ConfigError(f"train_neg_ratio: is 0, but {config['model']} learns from positive rows "
                              f"against sampled items; set it to 1 or more")

    def stages(self) -> list[Stage]:
        """One stage over the training rows of both domains."""
        return [Stage("both", "both", (self.ranking_loss,), self.parameters(), self.epochs)]

    def ranking_loss(self, interaction) -> Tensor:
        """The loss of a batch of both domains: a scalar."""
        raise NotImplementedError

    def rows(self, interaction, name: str) -> tuple[Tensor, Tensor]:
        """Users (b,) of a domain's rows, and their items (b, 1 + negatives), the positive first."""
        prefix = "source_" if name == "source" else ""
        item = functional.pad(interaction[prefix + self.NEG_ITEM_ID], (1, 0))
        item[:, 0] = interaction[prefix + self.ITEM_ID]
        return interaction[prefix + self.USER_ID], item

    def finetuning_loss(self, interaction) -> Tensor:
        """Cross-entropy of target rows and of the items sampled for them (rating 0)."""
        user, item = interaction[self.USER_ID], interaction[self.ITEM_ID]
        scores, penalty = self.finetuning_scores(user, item)
        label = (interaction[self.RATING] > 0).to(scores.dtype)
        return functional.binary_cross_entropy_with_logits(scores, label) + self.reg_weight * penalty

    def finetuning_scores(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (b,) of target pairs, and the penalty () on what fine-tuning changes."""
        raise NotImplementedError


def ranking_cross_entropy(scores: Tensor) -> Tensor:
    """Binary cross-entropy of scores (b, 1 + negatives), of which the first is positive: a scalar."""
    labels = scores.new_zeros(scores.shape)
    labels[:, 0] = 1
    return functional.binary_cross_entropy_with_logits(scores, labels)
