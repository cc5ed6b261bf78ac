"""Evaluation in both domains of a model that ranks in both (dual target)."""

import torch
from torch import Tensor

from recbole_mmdiff.data.preparation import Parts
from recbole_mmdiff.evaluator.evaluator import Evaluation, Evaluator

SOURCE = "source_"


def make_evaluator(config, parts: Parts) -> "Evaluator | DualEvaluator":
    """A ``DualEvaluator`` where both domains are evaluated, else an ``Evaluator`` of the target."""
    both = ranks_both(config, parts.observed.config["split_protocol"])
    return DualEvaluator(config, parts) if both else Evaluator(config, parts)


def ranks_both(config, split_protocol: str) -> bool:
    """Whether both domains are evaluated: the model has vectors of both (``vectors_of``), and both are split,
    which is what ``ratio`` does."""
    return config.cross_domain and hasattr(config.model_class, "vectors_of") and split_protocol == "ratio"


class DualEvaluator:
    """As ``Evaluator``, once for each domain; the names of the source's passes begin with ``source_``.

    Args:
        config: the run's configuration.
        parts: of a cross-domain data set whose source domain is split, too.
    """

    def __init__(self, config, parts: Parts):
        self.target, self.source = Evaluator(config, parts), Evaluator(config, parts.of_source())

    def score(self, model, phase: str = "valid") -> tuple[float, dict]:
        """The mean of both domains' ``valid_metric``, for early stopping, and what it was found with."""
        score, values = self.target.score(model, phase)
        source_score, source_values = self.source.score(SourceView(model), phase)
        named = {SOURCE + name: value for name, value in source_values.items()}
        return (score + source_score) / 2, values | named

    def evaluate(self, model, phase: str, passes: list[str] | None = None,
                 by_group: bool = False) -> Evaluation:
        """As ``Evaluator.evaluate``, in both domains."""
        found = self.target.evaluate(model, phase, passes, by_group)
        source = self.source.evaluate(SourceView(model), phase, passes, by_group)
        found.metrics |= {SOURCE + name: values for name, values in source.metrics.items()}
        for group, values in source.groups.items():
            found.groups.setdefault(group, {}).update(
                {SOURCE + name: value for name, value in values.items()})
        found.per_user |= {SOURCE + name: values for name, values in source.per_user.items()}
        return found


class SourceView:
    """A model of both domains as the evaluator takes it: a recommender of source items."""

    predicts_ratings = False

    def __init__(self, model):
        self.model, self.device = model, model.device

    def eval(self) -> "SourceView":
        """Evaluation mode of the model, which forgets nothing if it is in it."""
        if self.model.training:
            self.model.eval()
        return self

    @torch.no_grad()
    def predict(self, interaction) -> Tensor:
        """Scores (b,) of pairs of users and source items."""
        tables = self.model.vectors_of("source")
        users, items = interaction[self.model.USER_ID], interaction[self.model.ITEM_ID]
        return (tables.users[users] * tables.items[items]).sum(-1)

    @torch.no_grad()
    def full_sort_predict(self, interaction) -> Tensor:
        """Scores (b * n_items,) of all source items."""
        tables = self.model.vectors_of("source")
        return (tables.users[interaction[self.model.USER_ID]] @ tables.items.T).view(-1)
