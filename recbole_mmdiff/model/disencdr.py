"""DisenCDR: what users share between two domains, told apart from what is of one domain alone."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.loaders import SAMPLE_ID, rows_of_both_domains
from recbole_mmdiff.diffusion import fold_in, keyed_normal
from recbole_mmdiff.errors import at_least
from recbole_mmdiff.graph import mean_of_items, propagate, transpose
from recbole_mmdiff.model.base import take
from recbole_mmdiff.model.dual import DOMAINS, DualRankingRecommender, DualVectors, ranking_cross_entropy
from recbole_mmdiff.model.item_exploration import MayExploreItems
from recbole_mmdiff.model.representations import Representations

_USERS, _ITEMS, _SHARED = range(40, 43)


class Normal(NamedTuple):
    """Independent normal distributions: means and standard deviations, (n, d) each."""

    mean: Tensor
    deviation: Tensor

    def at(self, ids: Tensor) -> "Normal":
        """Those of some ids."""
        return Normal(take(self.mean, ids), take(self.deviation, ids))

    def sample(self, ids: Tensor, seed: int) -> Tensor:
        """(n, d) with a gradient, drawn for distinct ids (n,)."""
        return self.mean + self.deviation * keyed_normal(ids, self.mean.shape[1], seed, self.mean.dtype)

    def divergence(self, other: "Normal | None" = None) -> Tensor:
        """(n,): Kullback-Leibler divergence from ``other``; None is the standard normal distribution."""
        mean, deviation = other or (0.0, torch.ones_like(self.mean))
        ratio = self.deviation / deviation
        return (0.5 * (ratio.square() + ((self.mean - mean) / deviation).square() - 1) - ratio.log()).sum(-1)


class DisenCDR(MayExploreItems, DualVectors, DualRankingRecommender):
    """Variational vectors of users for each domain alone and, of linked users, for both.

    A variational encoder of a graph (VBGE): users tell their items, items tell their users, and a linear
    map of what is told and of the own start vector gives mean and deviation. Each domain has one for users
    and one for items. The shared part of a linked user joins what both domains' items tell, weighted by the
    user's numbers of rows. A score in a domain is <own part + shared part, item>.

    The loss of each domain: binary cross-entropy of training rows against sampled items,
    ``divergence_weight`` times the divergence of users' and items' vectors from the standard normal
    distribution, and for linked users that of the shared part, and its divergence from what either domain
    tells alone, ``shared_weight`` times (the information regularizers).

    With ``item_exploration`` the means of items are replaced by what SIEOUG's module joins out of them
    (``ItemExploration``), in both domains: scores are of means, and an average of other items' deviations
    would say nothing of how sure this one is. Samples and divergences are of the new means; deviations stay.

    Deviations:
        - The paper has overlapping users alone. Here users of one domain have no shared part.
        - A start vector of a user without training rows in a domain is zero there, so that the shared part
          alone speaks: of a cold-start user, what the source graph says.
        - Divergences are means over the distinct users and items of the batch, per dimension.
        - Scores are of the means; nothing is drawn in evaluation.
        - Graphs are averages of neighbours, in one layer there and back. No dropout.
    """

    citation = ("Cao, Lin, Cong, Ya, Liu and Wang: DisenCDR: Learning Disentangled Representations for "
                "Cross-Domain Recommendation. SIGIR 2022.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.size = config["embedding_size"]
        at_least("embedding_size", self.size, 1)
        for key in ("divergence_weight", "shared_weight"):
            at_least(key, config[key], 0)
        self.divergence_weight, self.shared_weight = config["divergence_weight"], config["shared_weight"]
        self.num_linked = dataset.num_overlap
        both = zip(DOMAINS, (dataset, dataset.source), rows_of_both_domains(config, dataset), strict=True)
        self.domains = nn.ModuleDict({
            name: Domain(rows[domain.uid_field], rows[domain.iid_field], domain.user_num, domain.item_num,
                         self.size)
            for name, domain, rows in both})
        self.shared = Head(self.size)
        self.explorations = self.explorations_of(config, dataset, self.size, config["exploration_layers"]) \
            if config["item_exploration"] else nn.ModuleDict()

    def items(self, name: str) -> Normal:
        """The vectors of all items of a domain, explored if they are."""
        items = self.domains[name].items()
        return Normal(self.explored(name, items.mean), items.deviation)

    # ---- the loss ------------------------------------------------------------------------------

    def shared_parts(self) -> tuple[Normal, Normal, Normal]:
        """Of the linked users and [PAD] (num_linked + 1, d): by both domains, by the target alone, by the
        source alone."""
        linked = slice(0, self.num_linked + 1)
        told, start, counts = {}, {}, {}
        for name in DOMAINS:
            domain = self.domains[name]
            told[name], start[name] = (part[linked] for part in (domain.told_users(), domain.start_users()))
            counts[name] = domain.count[linked, None]
        total = sum(counts.values()).clamp(min=1)
        both = [sum(counts[name] / total * part[name] for name in DOMAINS) for part in (told, start)]
        return self.shared(*both), *(self.shared(told[name], start[name]) for name in DOMAINS)

    def ranking_loss(self, interaction) -> Tensor:
        """The loss of the rows of both domains."""
        seed = fold_in(self.seed, self.epoch, int(interaction[SAMPLE_ID][0]))
        both, *alone = self.shared_parts()
        rows = {name: self.rows(interaction, name) for name in DOMAINS}
        linked = torch.unique(torch.cat([users[users <= self.num_linked] for users, _ in rows.values()]))
        drawn = both.at(linked).sample(linked, fold_in(seed, _SHARED))
        sampled = drawn.new_zeros(both.mean.shape).index_copy(0, linked, drawn)
        loss = sum(self._domain_loss(name, *rows[name], sampled, fold_in(seed, number))
                   for number, name in enumerate(DOMAINS))
        if not len(linked):
            return loss
        shared = both.at(linked)
        apart = sum(shared.divergence(part.at(linked)).mean() for part in alone)
        divergence = self.divergence_weight * shared.divergence().mean() + self.shared_weight * apart
        return loss + divergence / self.size

    def _domain_loss(self, name: str, user: Tensor, item: Tensor, shared: Tensor, seed: int) -> Tensor:
        users, items = self.domains[name].users(), self.items(name)
        (users, at_user), (items, at_item) = (
            self._drawn(part, ids, fold_in(seed, purpose)) for part, ids, purpose
            in ((users, user, _USERS), (items, item, _ITEMS)))
        known = torch.where(user <= self.num_linked, user, 0)
        vectors = take(users[0], at_user) + take(shared, known)
        scores = (vectors[:, None] * take(items[0], at_item)).sum(-1)
        divergence = (users[1].mean() + items[1].mean()) / self.size
        return ranking_cross_entropy(scores) + self.divergence_weight * divergence

    @staticmethod
    def _drawn(part: Normal, ids: Tensor, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Samples and divergences of the distinct ids, and the place of each id among them."""
        distinct, place = torch.unique(ids, return_inverse=True)
        chosen = part.at(distinct)
        return (chosen.sample(distinct, seed), chosen.divergence()), place

    # ---- scores --------------------------------------------------------------------------------

    def scoring_vectors(self) -> dict[str, Representations]:
        """The means."""
        shared, found = self.shared_parts()[0].mean, {}
        for domain, module in self.domains.items():
            users = module.users().mean
            users[1:len(shared)] += shared[1:]
            found[domain] = Representations(users, self.items(domain).mean)
        return found


class Head(nn.Module):
    """Mean and deviation of nodes by what is told to them and their start vectors, each (n, d)."""

    def __init__(self, size: int):
        super().__init__()
        self.told = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(2))
        self.joined = nn.ModuleList(nn.Linear(2 * size, size) for _ in range(2))

    def forward(self, told: Tensor, start: Tensor) -> Normal:
        mean, deviation = (joined(torch.cat([functional.leaky_relu(layer(told)), start], 1))
                           for layer, joined in zip(self.told, self.joined, strict=True))
        return Normal(mean, functional.softplus(deviation) + 1e-4)


class Domain(nn.Module):
    """The graph of one domain and its encoders.

    Args:
        users, items: (n,) ids of the training rows.
        num_users, num_items: ids are below them.
        size: d.
    """

    def __init__(self, users: Tensor, items: Tensor, num_users: int, num_items: int, size: int):
        super().__init__()
        self.user_embedding, self.item_embedding = (nn.Embedding(count, size)
                                                    for count in (num_users, num_items))
        for table in (self.user_embedding, self.item_embedding):
            nn.init.xavier_uniform_(table.weight)
        self.user_layer, self.item_layer = (nn.Linear(size, size, bias=False) for _ in range(2))
        self.user_head, self.item_head = Head(size), Head(size)
        # Means over a user's items, and over an item's users.
        for name, mean in (("of_items", mean_of_items(users, items, num_users, num_items)),
                           ("of_users", mean_of_items(items, users, num_items, num_users))):
            self.register_buffer(f"mean_{name}", mean, persistent=False)
            self.register_buffer(f"mean_{name}_transposed", transpose(mean), persistent=False)
        count = self.mean_of_items.crow_indices().diff().float()
        self.register_buffer("count", count, persistent=False)

    def start_users(self) -> Tensor:
        """Start vectors (n_users, d) of users, zero without rows."""
        return self.user_embedding.weight * (self.count > 0)[:, None]

    def told_users(self) -> Tensor:
        """(n_users, d): users' start vectors, told to items and back."""
        items = propagate(self.mean_of_users, self.start_users(), self.mean_of_users_transposed)
        items = functional.leaky_relu(self.user_layer(items))
        return propagate(self.mean_of_items, items, self.mean_of_items_transposed)

    def users(self) -> Normal:
        """The own parts of all users."""
        return self.user_head(self.told_users(), self.start_users())

    def items(self) -> Normal:
        """The vectors of all items."""
        users = propagate(self.mean_of_items, self.item_embedding.weight, self.mean_of_items_transposed)
        users = functional.leaky_relu(self.item_layer(users))
        told = propagate(self.mean_of_users, users, self.mean_of_users_transposed)
        return self.item_head(told, self.item_embedding.weight)
