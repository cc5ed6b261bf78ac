"""Users as the means of the features of what they rated, in each of two domains."""

from dataclasses import fields

import torch
from torch import Tensor, nn

from recbole_mmdiff.data.ids import ids_with_rows
from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.graph import mean_of_items
from recbole_mmdiff.model.bias import shrunken_item_biases, shrunken_means
from recbole_mmdiff.model.factorization import Factorization
from recbole_mmdiff.model.feature_space import Features
from recbole_mmdiff.model.forgetful import Forgetful

IDS = "id"      # the modality of the base factorisation


class DomainProfiles(Forgetful, nn.Module):
    """The item features of one domain, and the profiles of its users.

    A profile is a row for each modality: the mean of the features of the items that the user has
    rated in a training row, of those that have some; in the modality ``id`` also the user's own vector
    of the factorisation; or the users' own features in place of the means. Statistics of the ratings
    may stand behind. A user without any such item has no profile in that modality: it is zero, and
    what comes with the profiles says so.

    Args:
        dataset: of the domain, its training rows.
        num_users: profiles are made of the ids below it.
        items: modality -> features of the items.
        own: modality -> features of the users themselves, which take the place of the means.
        factorization: of the domain, for the modality ``id``; or None.
        id_profile: ``vector``, ``mean`` or ``both``: what a profile holds in that modality.
        statistics: (num_users, s) of the users' ratings, which stand behind each mean; s may be 0.
    """

    def __init__(self, dataset, num_users: int, items: dict[str, Features],
                 own: dict[str, Features], factorization: Factorization | None, id_profile: str,
                 statistics: Tensor):
        super().__init__()
        self.num_users, self.id_profile = num_users, id_profile
        self.factorization = factorization
        self.content, self.own = list(items), list(own)
        user, item = (dataset.inter_feat[f] for f in (dataset.uid_field, dataset.iid_field))
        kept = user < num_users
        constants = {"rows_user": user[kept], "rows_item": item[kept], "statistics": statistics,
                     "item_seen": ids_with_rows(dataset, dataset.iid_field)}
        for kind, features in (("item", items), ("user", own)):
            for number, found in enumerate(features.values()):
                constants |= {f"{kind}_{part}_{number}": value for part, value in vars(found).items()}
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        for number, size in enumerate(self.profile_sizes.values()):
            self.register_buffer(f"center_{number}", torch.zeros(size))
            self.register_buffer(f"scale_{number}", torch.ones(size))
        self.tables: dict[str, tuple[Tensor, Tensor]] = {}
        self.item_vectors: Tensor | None = None

    def forget(self) -> None:
        """Tables are computed anew: what they follow from has changed."""
        self.tables.clear()
        self.item_vectors = None

    # ---- items ---------------------------------------------------------------------------------

    @property
    def item_sizes(self) -> dict[str, int]:
        """Modality -> number of columns of its item features."""
        sizes = {name: getattr(self, f"item_values_{number}").shape[1]
                 for number, name in enumerate(self.content)}
        if self.factorization is not None:
            sizes[IDS] = self.factorization.item_embedding.embedding_dim
        return sizes

    def items(self, name: str) -> tuple[Tensor, Tensor]:
        """Features (items, k) in a modality, zero where not known, and which are known (items,)."""
        if name != IDS:
            number = self.content.index(name)
            return getattr(self, f"item_values_{number}"), getattr(self, f"item_known_{number}")
        if self.item_vectors is None:
            vectors = self.factorization.item_embedding.weight.detach()
            scale = vectors[self.item_seen].square().mean().sqrt().clamp(min=1e-9)
            self.item_vectors = vectors / scale * self.item_seen[:, None]
        return self.item_vectors, self.item_seen

    def of_new_items(self, items: NewItems) -> dict[str, tuple[Tensor, Tensor]]:
        """Modality -> what ``items`` gives of items outside of the data set: features (m, k), and which are
        known (m,). They have no ids."""
        found = {}
        for number, name in enumerate(self.content):
            values, missing = items.features[name]
            trained = Features(*(getattr(self, f"item_{part.name}_{number}") for part in fields(Features)))
            found[name] = trained.of(values, known := items.present(missing)), known
        if IDS in self.item_sizes:
            vectors, known = self.items(IDS)
            found[IDS] = vectors.new_zeros(len(items), vectors.shape[1]), known.new_zeros(len(items))
        return found

    # ---- users ---------------------------------------------------------------------------------

    @property
    def profile_sizes(self) -> dict[str, int]:
        """Modality -> number of columns of its profiles."""
        if self.own:
            sizes = {name: getattr(self, f"user_values_{number}").shape[1]
                     for number, name in enumerate(self.own)}
        else:
            sizes = {name: size for name, size in self.item_sizes.items() if name != IDS}
        if self.factorization is not None:
            sizes[IDS] = (self.id_profile != "mean") * self.factorization.size \
                + (self.id_profile != "vector") * self.factorization.item_embedding.embedding_dim
        return {name: size + self.statistics.shape[1] for name, size in sizes.items()}

    @torch.no_grad()
    def fit(self, users: Tensor) -> None:
        """Centre and scale every column by the profiles of some users (n,); one that is constant among
        them is centred alone."""
        self.forget()
        for number, name in enumerate(self.profile_sizes):
            table, has = self._raw(name)
            found = table[users[has[users]]]
            if len(found):
                mean, scale = found.mean(0), found.std(0, correction=0)
                constant = scale <= 1e-6 * mean.abs().clamp(min=1)
                getattr(self, f"center_{number}").copy_(mean)
                getattr(self, f"scale_{number}").copy_(torch.where(constant, 1.0, scale))

    def profiles(self, name: str, user: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised profiles (b, k) of users (b,) in a modality, and who has one (b,)."""
        if name not in self.tables:
            self.tables[name] = self._standardized(name)
        table, has = self.tables[name]
        return table.index_select(0, user), has.index_select(0, user)

    @torch.no_grad()
    def _standardized(self, name: str) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.rows_user.device.type, enabled=False):     # There is no sparse half.
            return self._in_units(name, *self._raw(name))

    def _in_units(self, name: str, table: Tensor, has: Tensor) -> tuple[Tensor, Tensor]:
        """Profiles (users, k) centred and scaled, and who ``has`` one (users,)."""
        number = list(self.profile_sizes).index(name)
        table = (table - getattr(self, f"center_{number}")) / getattr(self, f"scale_{number}")
        return table * has[:, None], has

    def _raw(self, name: str) -> tuple[Tensor, Tensor]:
        """Profiles (users, k) as they are, and who has one (users,)."""
        if name in self.own:
            number = self.own.index(name)
            values, has = (getattr(self, f"user_{kind}_{number}") for kind in ("values", "known"))
            return torch.cat([values, self.statistics], 1), has
        vectors = None
        if name == IDS and self.id_profile != "mean":
            everybody = torch.arange(self.num_users, device=self.rows_user.device)
            vectors = self.factorization.user_factors(everybody).detach()
        return self._of_rows(name, self.rows_user, self.rows_item, self.statistics, vectors)

    def _of_rows(self, name: str, user: Tensor, item: Tensor, statistics: Tensor,
                 vectors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Profiles (users, k) as they are out of rows of users (n,) and items (n,), and who has one
        (users,); ``vectors`` (users, d) of the factorisation, where they are part of it."""
        features, known = self.items(name)
        rows = known[item]
        user, item, count = user[rows], item[rows], len(statistics)
        has = torch.bincount(user, minlength=count) > 0
        parts = []
        if name == IDS and self.id_profile != "mean":
            parts.append(vectors)
        if name != IDS or self.id_profile != "vector":
            parts.append(mean_of_items(user, item, count, len(features)) @ features)
        return torch.cat([*parts, statistics], 1), has

    @torch.no_grad()
    def profiles_of_rows(self, user: Tensor, item: Tensor, statistics: Tensor,
                         vectors: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Modality -> standardised profiles (users, k) of users without an id, and who has one (users,).

        Args:
            user, item: (n,) places of the users, and ids of what they rated.
            statistics: (users, s) of their ratings.
            vectors: (users, d) as the factorisation would have them; None where they are of no use.
        """
        return {name: self._in_units(name, *self._of_rows(name, user, item, statistics, vectors))
                for name in self.profile_sizes}


def rating_statistics(dataset, rating_field: str, num_users: int, item_damping: float,
                      user_damping: float) -> Tensor:
    """(num_users, 2): log(1 + number of ratings), and the shrunken mean of what the items' means leave
    of them, of the users below ``num_users`` in the rows of a domain; 0 and 0 without a row."""
    user = dataset.inter_feat[dataset.uid_field]
    residual = shrunken_item_biases(dataset, rating_field, item_damping)[2]
    size = max(num_users, dataset.user_num)
    return residual_statistics(user, residual, size, user_damping)[:num_users]


def residual_statistics(user: Tensor, residual: Tensor, num_users: int, user_damping: float) -> Tensor:
    """The same (num_users, 2) out of what the items' means leave of ratings (n,) of users (n,)."""
    count = torch.bincount(user, minlength=num_users).double()
    mean = shrunken_means(user, residual, num_users, user_damping)
    return torch.stack([count.log1p(), mean], 1).float()
