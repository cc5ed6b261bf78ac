"""P2M2-CDR: a privacy-preserving framework with multi-modal data."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.ids import id_mask
from recbole_mmdiff.data.modalities import item_modalities
from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.diffusion import fold_in, keyed_uniform
from recbole_mmdiff.errors import share
from recbole_mmdiff.model.base import FinetunedOffset, OffsetRecommender, Stage, take
from recbole_mmdiff.model.disentanglement import (
    DomainEncoder,
    Parts,
    inter_domain_loss,
    intra_domain_loss,
    keyed_laplace,
)

# What the numbers drawn for a user are for: each purpose has a stream of its own.
_DROP, _NOISE, _COLD = range(3)


class P2M2CDR(OffsetRecommender):
    """Common and specific parts of a user in each domain, of ids and modalities, aligned in private.

    In each domain an item is its id vector plus relu(W_m x) for every modality m it has, a user the
    id vector plus relu(W_m' of the mean x of the training items). The disentangled encoder makes a
    domain-common part c = relu(W_c u) and a domain-specific part s = relu(W_s u) of a user; the sum
    z of both meets the items of the domain. Before a part leaves its domain, Laplace noise is added
    (local differential privacy, ``noise_scale`` = sensitivity / epsilon). Two contrastive losses
    act on users: ``domain-inter`` pulls the noisy c of both domains together and keeps them from
    the s, ``domain-intra`` pulls two dropout views of c, and of s, together and c from s.

    Deviations:
        - A rating head in place of the perceptron and cross-entropy of ranking, because the
          multimodal papers print MAE and RMSE of it: r = mu + b_i + <z, v_i> + <w, z>, where v_i is a
          linear map of the item, b_i a learned item bias, <w, z> the user's bias read from z, so
          that it crosses domains with z, and mu the mean training rating of the domain; squared
          error in both domains. ``train_neg_ratio`` adds items rated 0, for rankings.
        - The paper's users have rows in both domains. A user without target training rows is z =
          D times the noisy c of the source plus a learned default in place of s, with a matrix D
          that starts as the identity. In each epoch a share ``cold_rate`` of the overlapping
          training users is predicted in that form. The rating loss has no gradient back into the
          source: else c of the training users would hold their target ratings, as no cold user's
          can, and the source would learn of them what was not to be shared.
        - No graph convolution of the id vectors, since the published code takes one of their random
          start only, and no reviews of users, which the data do not hold.
        - Contrastive losses are means over the unique users of a batch, of -log of the softmax
          weight of the positive pairs, so that their weights do not depend on the batch size; the
          published code has sums, over rows, and no exponentials in one domain. Its pairs are kept.
        - Noise is on what crosses only: the parts in the domain-inter loss and a cold user's c, in
          test too; it is one draw for a user and an epoch. Vectors are not clipped, as in the
          published code, so that ``noise_scale`` states no formal epsilon.
        - Features and user means are standardised by column. An item without features is left out
          of that modality (``modality_policy: drop_item``), or filled in as the policy says.
        - Dropout and noise are drawn by (seed, epoch, user), so that they do not depend on the
          batch. The best epoch is chosen on validation users.
    """

    citation = ("Wang, Sang, Zhang, Wu and Xu: A Privacy-Preserving Framework with Multi-Modal Data "
                "for Cross-Domain Recommendation. arXiv:2403.03600, 2024.")
    needs_source = True
    domain_views = ("target",)

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.epochs, self.reg_weight = config["epochs"], config["reg_weight"]
        self.run_seed = config["seed"]
        self.inter_weight, self.intra_weight = config["inter_weight"], config["intra_weight"]
        self.temperature, self.noise_scale = config["temperature"], config["noise_scale"]
        self.dropout_prob, self.cold_rate = config["dropout_prob"], config["cold_rate"]
        for key in ("dropout_prob", "cold_rate"):
            share(key, config[key], below_one=True)
        sizes = config["embedding_size"], config["disentangled_size"]
        self.domains = nn.ModuleDict({
            name: DomainEncoder(domain, self.RATING, *sizes, config["init_std"], item_modalities(
                domain, config["modalities"], config["modality_policy"]), config["modality_policy"])
            for name, domain in (("target", dataset), ("source", dataset.source))})
        self.user_offset = FinetunedOffset(dataset, sizes[1] + 1)
        self.decoder = nn.Linear(sizes[1], sizes[1])
        nn.init.eye_(self.decoder.weight)
        nn.init.zeros_(self.decoder.bias)
        source_users = dataset.source.inter_feat[dataset.source.uid_field]
        for name, users in (("source", source_users), ("target", dataset.users_with_rows())):
            self.register_buffer(f"in_{name}", id_mask(users, dataset.user_num))

    def stages(self) -> list[Stage]:
        """One stage over the ratings of both domains."""
        return [Stage("both", "both", (self.training_loss,), self.parameters(), self.epochs)]

    def item_bias_parameters(self):
        """b_i of target items."""
        return self.domains["target"].item_bias.parameters()

    # ---- parts of users ------------------------------------------------------------------------

    def parts(self, name: str, user: Tensor) -> Parts:
        """c and s (b, k) of users in a domain."""
        return self.domains[name].disentangle(self.domains[name].users(user))

    def dropout_view(self, name: str, user: Tensor, parts: Parts, number: int) -> Parts:
        """One of several views of c and s of users, with some values dropped."""
        if not self.dropout_prob:
            return parts
        seed = fold_in(self.seed, self.epoch, _DROP, self._number(name), number)
        uniform = keyed_uniform(user, 2 * parts[0].shape[1], seed)
        kept = (uniform >= self.dropout_prob).to(parts[0].dtype) / (1 - self.dropout_prob)
        return tuple(part * mask for part, mask
                     in zip(parts, kept.chunk(2, dim=1), strict=True))

    def obfuscated(self, name: str, user: Tensor, parts: Parts, in_test: bool = False) -> Parts:
        """What the other domain sees of c and s: with Laplace noise, of this epoch or of the test."""
        purpose = (_NOISE, self._number(name))
        # The test's is the run's, since each stage has a seed of its own.
        seed = fold_in(self.run_seed, *purpose) if in_test else fold_in(self.seed, self.epoch, *purpose)
        noise = keyed_laplace(user, 2 * parts[0].shape[1], seed, self.noise_scale)
        return tuple(part + drawn for part, drawn
                     in zip(parts, noise.to(parts[0].dtype).chunk(2, dim=1), strict=True))

    @staticmethod
    def _number(name: str) -> int:
        return ("target", "source").index(name)

    # ---- losses --------------------------------------------------------------------------------

    def training_loss(self, interaction) -> Tensor:
        """Squared error and penalty in both domains, plus the weighted contrastive losses."""
        target_rows, source_rows = (self._rows(interaction, prefix) for prefix in ("", "source_"))
        target = torch.unique(target_rows[0])
        linked = target[self.in_source[target]]
        source = torch.unique(torch.cat([source_rows[0], linked]))
        users = {"target": target, "source": source}
        whole = {name: self.parts(name, users[name]) for name in users}
        parts = {name: self.dropout_view(name, users[name], whole[name], 0) for name in users}
        of_linked = {"target": _at(parts["target"], target, linked),
                     "source": _at(parts["source"], source, linked)}
        crossed = {name: self.obfuscated(name, linked, of_linked[name]) for name in of_linked}
        vectors = sum(parts["target"])
        cold = self._as_cold(linked)[:, None]
        place = torch.searchsorted(target, linked)
        vectors = vectors.index_put((place,), torch.where(
            cold, self.decoder(crossed["source"][0].detach()), take(vectors, place)))
        loss = self._rating_loss("target", vectors, target, *target_rows) \
            + self._rating_loss("source", sum(parts["source"]), source, *source_rows)
        if self.inter_weight and len(linked):
            loss = loss + self.inter_weight * inter_domain_loss(
                *crossed["source"], *crossed["target"], self.temperature)
        if self.intra_weight:
            loss = loss + self.intra_weight * sum(intra_domain_loss(
                *parts[name], *self.dropout_view(name, users[name], whole[name], 1),
                self.temperature) for name in users)
        return loss

    def _as_cold(self, user: Tensor) -> Tensor:
        seed = fold_in(self.seed, self.epoch, _COLD)
        return keyed_uniform(user, 1, seed).squeeze(-1) < self.cold_rate

    def _rows(self, interaction, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
        """Users, items and ratings (n,) of a domain, sampled items rated 0 included."""
        user, item, rating = (interaction[prefix + field]
                              for field in (self.USER_ID, self.ITEM_ID, self.RATING))
        if prefix + self.NEG_ITEM_ID in interaction:
            negative = interaction[prefix + self.NEG_ITEM_ID]
            user = torch.cat([user, user.repeat_interleave(negative.shape[1])])
            item = torch.cat([item, negative.reshape(-1)])
            rating = torch.cat([rating, rating.new_zeros(negative.numel())])
        return user, item, rating

    def _rating_loss(self, name: str, vectors: Tensor, known: Tensor, user: Tensor, item: Tensor,
                     rating: Tensor) -> Tensor:
        """Of rows whose users' z are the rows of ``vectors`` (n, k), ordered as ``known`` (n,)."""
        domain = self.domains[name]
        users = take(domain.user_factors(vectors), torch.searchsorted(known, user))
        items, place = torch.unique(item, return_inverse=True)
        item_factors = take(domain.item_factors(items), place)
        scores = (users * item_factors).sum(-1) + domain.item_offset(item)
        penalty = (users.square().sum(-1) + item_factors[:, :-1].square().sum(-1)
                   + domain.item_bias(item).squeeze(-1).square()).mean()
        return functional.mse_loss(scores, rating) + self.reg_weight * penalty

    # ---- scores --------------------------------------------------------------------------------

    def computed_user_factors(self, user: Tensor) -> Tensor:
        """(b, k + 1): [z, <w, z>] of users."""
        common = self.obfuscated("source", user, self.parts("source", user), in_test=True)[0]
        cold = self.decoder(self.in_source[user, None] * common)
        vectors = torch.where(self.in_target[user, None], sum(self.parts("target", user)), cold)
        return self.domains["target"].user_factors(vectors)

    def item_factors(self, item: Tensor) -> Tensor:
        """(b, k + 1): [v_i, 1] of items."""
        return self.domains["target"].item_factors(item)

    @torch.no_grad()
    def vectors_of_new_items(self, items: NewItems) -> tuple[Tensor, Tensor]:
        """[v_i, 1] and mu of items outside of the training, out of their modalities. An item of the data set
        without rows also has the id vector that it started with, of ``init_std``; but for that the two are
        equal."""
        return self.domains["target"].vectors_of_new_items(items)

    def item_offset(self, item: Tensor) -> Tensor:
        """(b,): mu + b_i of items."""
        return self.domains["target"].item_offset(item)


def _at(parts: Parts, known: Tensor, user: Tensor) -> Parts:
    """The rows of ``user`` (m,) in parts that are ordered as ``known`` (n,) is."""
    place = torch.searchsorted(known, user)
    return take(parts[0], place), take(parts[1], place)
