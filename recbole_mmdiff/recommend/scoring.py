"""Scores of users and items that a model was not trained with."""

import torch
from torch import Tensor

from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.evaluator.memory import in_chunks, telling_of_memory
from recbole_mmdiff.model.base import StagedRecommender
from recbole_mmdiff.model.new_users import SourceRows

USERS_AT_ONCE = 1024    # whose vectors are made together


class Scorer:
    """A model as the ranking takes it, whose users or items, or both, may be new.

    Args:
        model: one of ours.
        uid_field: the column of users in a request: places in ``rows``, or else ids.
        rows: what new users rated; None ranks for known users.
        items: new items, which are scored behind the known ones; None scores these alone.

    Raises:
        ConfigError: the model makes no vectors of new users, or of new items.
    """

    @torch.no_grad()
    def __init__(self, model: StagedRecommender, uid_field: str, rows: SourceRows | None,
                 items: NewItems | None):
        self.model, self.device, self.uid_field = model.eval(), model.device, uid_field
        self.users = self.items = None
        if items is not None:
            with telling_of_memory(model.device, f"{len(items)} new items"):
                self.items = model.vectors_of_new_items(items.to(model.device))
        if rows is not None:
            self.users = self._users(rows)

    def _users(self, rows: SourceRows) -> Tensor:
        def vectors(places: Tensor) -> Tensor:
            return self.model.vectors_of_new_users(rows.of_users(places).to(self.device))

        with telling_of_memory(self.device, "one new user"):
            parts = in_chunks(torch.arange(rows.count), USERS_AT_ONCE, vectors, "new users")
            return torch.cat([found for _, found in parts])

    def eval(self) -> "Scorer":
        """The model stays in evaluation mode, and remembers what it has computed."""
        return self

    @torch.no_grad()
    def full_sort_predict(self, interaction) -> Tensor:
        """Scores (b * n,) of all target items, and the new ones."""
        asked = interaction[self.uid_field]
        users = self.model.user_factors(asked) if self.users is None else self.users[asked]
        scores = self.model.score_items(users)
        if self.items is not None:
            factors, offsets = self.items
            scores = torch.cat([scores, users @ factors.T + offsets], 1)
        return scores.view(-1)
