"""Bias: the floor that every rating model must be held against."""

import torch
from torch import Tensor

from recbole_mmdiff.model.base import Stage, StagedRecommender


class Bias(StagedRecommender):
    """Shrunken item mean plus the user's bias, which also source-domain ratings tell.

    r = mu_t + b_i + b_u. Item biases of each domain are shrunken means of (rating - mu of the
    domain); the user bias is the shrunken mean of what is left of all ratings of the user in both
    domains. A cold-start user is therefore judged by the source domain alone. Closed form: nothing
    is trained by gradient, one pass over the ratings, no randomness.

    Deviations: none; this is a floor, not a paper's model. In a single domain the user bias is the
    one of that domain.
    """

    citation = "Koren: Factor in the Neighbors. TKDD 4(1), 2010, section 2.1 (baseline estimates)."

    uses_source = True
    domain_views = ("target",)

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        source = getattr(dataset, "source", None)
        domains = [(dataset, self.RATING)] + ([(source, self.RATING)] if source else [])
        users = max(domain.user_num for domain, _ in domains)
        rows = []
        for domain, field in reversed(domains):
            mean, item_bias, residual = shrunken_item_biases(domain, field, config["item_damping"])
            rows.append((domain.inter_feat[domain.uid_field], residual))
        finetune = getattr(dataset, "finetune", None)
        if finetune is not None and self.finetune_epochs:
            user, item = (finetune.inter_feat[f] for f in (dataset.uid_field, dataset.iid_field))
            rows.append((user, finetune.inter_feat[self.RATING].double() - mean - item_bias[item]))
        everything = (torch.cat(parts) for parts in zip(*rows, strict=True))
        user_bias = shrunken_means(*everything, users, config["user_damping"])
        self.register_buffer("mean", mean.float())
        self.register_buffer("item_bias", item_bias.float())
        self.register_buffer("user_bias", user_bias[:dataset.user_num].float())

    def stages(self) -> list[Stage]:
        """None: the estimates are in place."""
        return []

    def finetuning_stage(self) -> None:
        """None: the user bias already counts the rows that are set aside for it."""
        return None

    def user_factors(self, user: Tensor) -> Tensor:
        """(b, 1): b_u."""
        return self.user_bias[user, None]

    def item_factors(self, item: Tensor) -> Tensor:
        """(b, 1): ones."""
        return torch.ones(len(item), 1, device=item.device)

    def item_offset(self, item: Tensor) -> Tensor:
        """(b,): mu_t + b_i."""
        return self.mean + self.item_bias[item]


def shrunken_item_biases(domain, field: str, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (), item biases (items,), and what they leave of each rating (n,), in float64.

    Args:
        domain: the data set whose rows are averaged.
        field: its column of ratings.
        damping: how many ratings at the mean every item is given; one without rows has bias 0.
    """
    rating = domain.inter_feat[field].double()
    item = domain.inter_feat[domain.iid_field]
    mean = rating.mean()
    bias = shrunken_means(item, rating - mean, domain.item_num, damping)
    return mean, bias, rating - mean - bias[item]


def shrunken_means(ids: Tensor, values: Tensor, count: int, damping: float) -> Tensor:
    """(count,) float64: the mean of the values (n,) of each id (n,) and ``damping`` zeros; 0 without a
    value."""
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, ids, values)
    return total / (torch.bincount(ids, minlength=count) + damping).clamp(min=1e-9)
