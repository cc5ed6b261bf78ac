"""VBPR: matrix factorisation with a second taste, for what an item's features show."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.model.base import take
from recbole_mmdiff.model.item_features import ItemFeatures
from recbole_mmdiff.model.pairwise import PairwiseRecommender, bpr_loss, mean_square
from recbole_mmdiff.model.representations import Representations


class VBPR(PairwiseRecommender):
    """Bayesian personalised ranking from ids and features.

    score(u, i) = <gamma_u, gamma_i> + <theta_u, E f_i> + beta_i + <beta', f_i>. E f_i is the sum of the
    projected features of all modalities, which is the projection of their concatenation. The loss is BPR,
    plus ``reg_weight`` times half the squared length of the vectors of a batch.

    Deviations:
        - The paper has images only; here any number of modalities is summed. One that an item lacks adds
          nothing.
        - E f_i and <beta', f_i> have a constant for each modality, so that features need no centre.
        - The penalty is on the vectors that meet in the scores, E f_i among them, instead of E itself.
        - The biases are a key: the public toolbox has none.
        - A user without a training row gets the mean vector of the others.
    """

    citation = ("He and McAuley: VBPR: Visual Bayesian Personalized Ranking from Implicit Feedback. "
                "AAAI 2016.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.reg_weight = config["reg_weight"]
        # A bias is one more column, which meets a 1 of the user's.
        self.num_biases = int(config["biases"])
        self.user_embedding, self.user_tastes = self.embedding(self.n_users), self.embedding(self.n_users)
        self.item_embedding = self.embedding(self.n_items)
        self.item_bias = nn.Embedding(self.n_items, self.num_biases)
        nn.init.zeros_(self.item_bias.weight)
        self.features = ItemFeatures(dataset, config["modalities"], config["modality_policy"],
                                     self.size + self.num_biases)

    def user_rows(self, users: Tensor) -> Tensor:
        """(b, 2, d): gamma and theta of users (b,)."""
        return torch.stack([take(table.weight, users)
                            for table in (self.user_embedding, self.user_tastes)], 1)

    def with_ones(self, rows: Tensor) -> Tensor:
        """(b, 2 (d + biases)): ``user_rows`` with the ones that biases meet."""
        return functional.pad(rows, (0, self.num_biases), value=1.0).flatten(1)

    def item_vectors(self, items: Tensor) -> Tensor:
        """(b, 2 (d + biases)): gamma, beta, E f and <beta', f> of distinct items (b,)."""
        return torch.cat([*(take(table.weight, items) for table in (self.item_embedding, self.item_bias)),
                          self.features.project(items).sum(1)], 1)

    @torch.no_grad()
    def vectors_of_new_items(self, items: NewItems) -> tuple[Tensor, Tensor]:
        """E f and <beta', f>, and 0 in the place of gamma and beta, which only rows tell: score = <theta_u,
        E f> + <beta', f>. An item of the data set without rows has a gamma and a beta too, of its start and
        of the times that it was drawn as a negative; but for these the two are equal."""
        visible = self.features.project_new(items).sum(1)
        factors = functional.pad(visible, (self.size + self.num_biases, 0))
        return factors, factors.new_zeros(len(items))

    def representations(self) -> Representations:
        """The vectors of all users and items, with gradient."""
        users, items = (torch.arange(count, device=self.device) for count in (self.n_users, self.n_items))
        return Representations(self.with_ones(self.user_rows(users)), self.item_vectors(items))

    def ranking_loss(self, interaction) -> Tensor:
        """BPR and the penalty; features are projected for the items of the batch alone, unless the sampler
        looks at all."""
        batch = self.triples(interaction, self.representations() if self.negatives.needs_vectors else None)
        users, (items, place) = self.user_rows(batch.users), torch.unique(batch.items(), return_inverse=True)
        vectors = take(self.item_vectors(items), place)
        positives, negatives = vectors[:, 0], vectors[:, 1:]
        if batch.negatives.vectors is not None:
            negatives = batch.negatives.vectors
        return bpr_loss(self.with_ones(users), positives, negatives) \
            + self.reg_weight * mean_square(users.flatten(1), positives, negatives)
