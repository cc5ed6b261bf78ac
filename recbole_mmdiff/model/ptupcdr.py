"""PTUPCDR: personalised transfer of user preferences."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.base import Stage, take
from recbole_mmdiff.model.mapping import MappingRecommender


class PTUPCDR(MappingRecommender):
    """A meta network writes a bridge of their own for every user, out of what they liked.

    Two factorisations are trained apart. An attention (Linear, ReLU, Linear to one score, softmax)
    weighs the source items of a user's history; from their weighted sum a perceptron makes a
    matrix, the bridge, and u_s times the bridge is the user's target vector. Only this meta network
    is then trained, on the rating errors of the overlapping training users' target rows.

    The history is the source items rated above ``history_threshold``, the last ``history_length``
    by time (of equal times the larger item id is the later; without a time column all are equal,
    so that the items whose tokens sort last are kept).

    Deviations:
        - A user without such items has the zero vector in place of the weighted sum, so that the
          bridge is the perceptron's answer to zero: on standardised vectors, to the mean item. The
          authors' code spreads the attention over padding.
        - The attention sees [q_i, b_i], all that a biased base knows of an item ([q_i, 1], by which
          users are scored, ends in a constant); q_i without biases.
        - The base has biases and an L2 penalty, [p_u, b_u] is transferred, and user vectors are
          standardised in each domain, item vectors over the source items (``biases``,
          ``reg_weight``, ``standardize``), because the meta network otherwise sees numbers near 0.
        - A user who stands in several rows of a batch has the bridge made once.
        - The best epoch is chosen on validation users; the authors' code chooses it on test users.
    """

    citation = ("Zhu, Tang, Liu, Zhuang, Xie, Zhang, Lin and He: Personalized Transfer of User "
                "Preferences for Cross-domain Recommendation. WSDM 2022.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.epochs = config["epochs"]
        self.meta_weight_decay = config["meta_weight_decay"]
        self.history_length = config["history_length"]
        # A bridge is a matrix: those of all users of a large evaluation would not fit.
        self.users_at_once = max(1, config["eval_chunk_elements"] // self.size**2)
        for key in ("history_length", "meta_size"):
            if config[key] < 1:
                raise ConfigError(f"{key}: {config[key]!r} is too small, use 1 or more")
        self.attention = nn.Sequential(nn.Linear(self.size, self.size), nn.ReLU(),
                                       nn.Linear(self.size, 1, bias=False))
        self.decoder = nn.Sequential(nn.Linear(self.size, config["meta_size"]), nn.ReLU(),
                                     nn.Linear(config["meta_size"], self.size**2))
        items, counts = self._histories(dataset.source, config["history_threshold"])
        ends = counts.cumsum(0)
        self.register_buffer("history_items", items, persistent=False)
        self.register_buffer("history_counts", counts, persistent=False)
        self.register_buffer("history_starts", ends - counts, persistent=False)
        rated = torch.unique(dataset.source.inter_feat[dataset.source.iid_field])
        self.register_buffer("rated_items", rated, persistent=False)

    def _histories(self, source, threshold: float) -> tuple[Tensor, Tensor]:
        """Items of all histories, user after user and oldest first (m,), and their number (users,)."""
        rows = source.inter_feat
        kept = (rows[self.RATING] > threshold) & (rows[source.uid_field] < self.n_users)
        user, item = (rows[field][kept].numpy() for field in (source.uid_field, source.iid_field))
        time = rows[source.time_field][kept].numpy() if source.time_field in rows \
            else np.zeros(len(user))
        order = np.lexsort((item, time, user))
        counts = np.bincount(user, minlength=self.n_users)
        later = np.cumsum(counts)[user[order]] - 1 - np.arange(len(order))
        items = item[order][later < self.history_length]
        return torch.from_numpy(items), torch.from_numpy(counts.clip(max=self.history_length))

    def stages(self) -> list[Stage]:
        """The two factorisations, then the meta network over rating rows of overlapping users."""
        parameters = [*self.attention.parameters(), *self.decoder.parameters()]
        bridge = Stage("bridge", "overlap_ratings", (self.rating_loss,), parameters, self.epochs,
                       weight_decay=self.meta_weight_decay, prepare=self.freeze_spaces)
        return [*self.pretraining_stages(), bridge]

    def rating_loss(self, interaction) -> Tensor:
        """Mean squared error of a batch of target ratings: a scalar."""
        users, place = torch.unique(interaction[self.USER_ID], return_inverse=True)
        factors = take(self.in_target_space(self.transfer(users)), place)
        with torch.no_grad():
            item = interaction[self.ITEM_ID]
            item_factors, offset = self.item_factors(item), self.item_offset(item)
        return functional.mse_loss((factors * item_factors).sum(-1) + offset, interaction[self.RATING])

    def transfer(self, user: Tensor) -> Tensor:
        """(b, size): u_s times the user's bridge."""
        return torch.cat([self._bridged(part) for part in user.split(self.users_at_once)])

    def _bridged(self, user: Tensor) -> Tensor:
        bridge = self.decoder(self.attended(user)).view(-1, self.size, self.size)
        return torch.bmm(self.source_vectors(user)[:, None], bridge).squeeze(1)

    def attended(self, user: Tensor) -> Tensor:
        """(b, size): attention-weighted sum of the histories of users (b,); 0 where one is empty."""
        item, present = self.history(user)
        vectors = self.source_item_vectors()[item]
        scores = self.attention(vectors).squeeze(-1)
        scores = scores.masked_fill(~present, torch.finfo(scores.dtype).min)
        return ((scores.softmax(-1) * present)[..., None] * vectors).sum(1)

    def history(self, user: Tensor) -> tuple[Tensor, Tensor]:
        """Source items (b, history_length) of users (b,), oldest first, 0 after the last one; and
        whether there is an item at that place, bool of the same shape."""
        place = torch.arange(self.history_length, device=user.device)
        present = place < self.history_counts[user, None]
        item = torch.zeros_like(present, dtype=torch.int64)
        item[present] = self.history_items[(self.history_starts[user, None] + place)[present]]
        return item, present

    @torch.no_grad()
    def source_item_vectors(self) -> Tensor:
        """(source items, size): [q_i, b_i] or q_i, standardised where users are; no gradient."""
        if "items" not in self.frozen:
            vectors = self.source.item_embedding.weight.detach()
            if self.source.biases:
                vectors = torch.cat([vectors, self.source.item_bias.weight], -1)
            if self.standardize:
                rated = vectors[self.rated_items]
                vectors = (vectors - rated.mean(0)) / rated.std(0, correction=0).clamp(min=1e-6)
            self.frozen["items"] = vectors
        return self.frozen["items"]
