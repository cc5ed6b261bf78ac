"""MF: matrix factorisation of the target domain alone (the papers' TGT)."""

import torch
from torch import Tensor

from recbole_mmdiff.data.ids import ids_with_rows
from recbole_mmdiff.errors import one_of
from recbole_mmdiff.model.base import Stage, StagedRecommender, finetuned_users
from recbole_mmdiff.model.factorization import Factorization


class MF(StagedRecommender):
    """Matrix factorisation on the ratings of one domain.

    The papers' "TGT": trained on target ratings only, so that a cold-start user keeps an untrained
    vector. Their form is plain (no biases, N(0, 1) start, no regularisation) and is what the paper
    recipes set; the defaults here are tuned: biases, a small start, an L2 penalty, and a user
    without training rows is scored as the mean user, which is about the item mean.

    Deviations from the papers' baseline:
        - ``untrained_users: mean`` scores a cold-start user by the mean vector of the trained
          users; ``start`` leaves the vector as it was drawn, as the papers do (MAE above 4).
        - Biases, ``init_std`` and ``reg_weight`` are keys, because a baseline that nobody tuned
          says nothing about a model (``biases: False, init_std: 1.0, reg_weight: 0.0`` is theirs).
        - The best epoch is chosen on validation users, theirs on test users.
    """

    citation = ("Koren, Bell and Volinsky: Matrix Factorization Techniques for Recommender "
                "Systems. Computer 42(8), 2009.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.reg_weight = config["reg_weight"]
        self.epochs = config["epochs"]
        self.factorization = Factorization(dataset, self.RATING, config["embedding_size"],
                                           config["biases"], config["init_std"])
        self.untrained_users = one_of("untrained_users", config["untrained_users"],
                                      ("mean", "start"))
        self.register_buffer("is_trained", ids_with_rows(dataset, dataset.uid_field))
        self.register_buffer("is_finetuned", finetuned_users(dataset))

    def stages(self) -> list[Stage]:
        """One stage over the ratings of the training part."""
        return [Stage("ratings", "target", (self.rating_loss,), self.parameters(), self.epochs)]

    def finetuning_stage(self) -> Stage:
        """Target ratings move the vectors of the held-out users on from where they stand."""
        return self._finetuning(self.rating_loss, self.factorization.tables(self.finetune_items),
                                prepare=self.start_from_scored)

    @torch.no_grad()
    def start_from_scored(self) -> None:
        """The start of fine-tuning: an untrained user's vector is the one that he is scored by."""
        users = (self.is_finetuned & ~self.is_trained).nonzero().squeeze(-1)
        if len(users):
            self.factorization.set_user_factors(users, self.user_factors(users))
            self.is_trained[users] = True

    def rating_loss(self, interaction) -> Tensor:
        """Regularised squared error of a batch of ratings."""
        return self.factorization.loss(interaction[self.USER_ID], interaction[self.ITEM_ID],
                                       interaction[self.RATING], self.reg_weight)

    def user_factors(self, user: Tensor) -> Tensor:
        """(b, k): user vectors, with the bias at the end if there are biases."""
        factors = self.factorization.user_factors(user)
        if self.untrained_users == "start" or self.is_trained[user].all():
            return factors
        # Whoever fine-tuning reaches is left out: it must not move anybody else.
        trained = (self.is_trained & ~self.is_finetuned).nonzero().squeeze(-1)
        mean = self.factorization.user_factors(trained).mean(0)
        return torch.where(self.is_trained[user, None], factors, mean)

    def item_factors(self, item: Tensor) -> Tensor:
        """(b, k): item vectors, with a one at the end if there are biases."""
        return self.factorization.item_factors(item)

    def item_offset(self, item: Tensor) -> Tensor:
        """(b,): 0, or mean rating plus item bias."""
        return self.factorization.item_offset(item)
