"""What P2M2-CDR is made of: the encoder of a domain, Laplace noise, contrastive losses."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.ids import id_mask
from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.diffusion import keyed_uniform
from recbole_mmdiff.graph import mean_of_items

Parts = tuple[Tensor, Tensor]


class DomainEncoder(nn.Module):
    """Ids and modalities of one domain, and the common and specific parts of its users.

    Args:
        dataset: of the domain; its training rows give the users' means of features.
        rating_field: the column of ratings.
        embedding_size, disentangled_size: length of id vectors; of c, s and v.
        init_std: standard deviation of the start of id vectors.
        modalities: as ``item_modalities`` gives them.
        policy: ``drop_item`` leaves items without a row out; any other takes them as filled in.
    """

    def __init__(self, dataset, rating_field: str, embedding_size: int, disentangled_size: int,
                 init_std: float, modalities: dict[str, tuple[Tensor, Tensor]], policy: str):
        super().__init__()
        users, items = (dataset.inter_feat[f] for f in (dataset.uid_field, dataset.iid_field))
        self.user_embedding = nn.Embedding(dataset.user_num, embedding_size)
        self.item_embedding = nn.Embedding(dataset.item_num, embedding_size)
        for table in (self.user_embedding, self.item_embedding):
            nn.init.normal_(table.weight, std=init_std)
        self.item_bias = nn.Embedding(dataset.item_num, 1)
        nn.init.zeros_(self.item_bias.weight)
        self.register_buffer("mean", dataset.inter_feat[rating_field].mean())
        # By position: any text may be the name of a modality.
        self.modalities = nn.ModuleList(
            Modality(features, _present(missing, policy), users, items, dataset.user_num, embedding_size)
            for features, missing in modalities.values())
        self.common, self.specific, self.item_layer = (
            nn.Linear(embedding_size, disentangled_size) for _ in range(3))
        self.user_bias = nn.Linear(disentangled_size, 1, bias=False)

    def users(self, user: Tensor) -> Tensor:
        """(b, d): u, of ids and modalities."""
        return self.user_embedding(user) + sum(part.of_users(user) for part in self.modalities)

    def disentangle(self, users: Tensor) -> Parts:
        """c and s (b, k) of u (b, d)."""
        return self.common(users).relu(), self.specific(users).relu()

    def user_factors(self, vectors: Tensor) -> Tensor:
        """(b, k + 1): [z, <w, z>] of z (b, k)."""
        return torch.cat([vectors, self.user_bias(vectors)], -1)

    def item_factors(self, item: Tensor) -> Tensor:
        """(b, k + 1): [v_i, 1] of items (b,)."""
        items = self.item_embedding(item) + sum(part.of_items(item) for part in self.modalities)
        return functional.pad(self.item_layer(items), (0, 1), value=1.0)

    def vectors_of_new_items(self, items: NewItems) -> tuple[Tensor, Tensor]:
        """[v_i, 1] (m, k + 1) and mu (m,) of items without rows, of their modalities alone."""
        found = sum(part.of_new_items(values, items.present(missing))
                    for part, (values, missing) in zip(self.modalities, items.features.values(), strict=True))
        return functional.pad(self.item_layer(found), (0, 1), value=1.0), self.mean.expand(len(items))

    def item_offset(self, item: Tensor) -> Tensor:
        """(b,): mu + b_i of items (b,)."""
        return self.mean + self.item_bias(item).squeeze(-1)


class Modality(nn.Module):
    """One modality in one domain: features of items, their means over users' items, two layers.

    Args:
        features, present: (items, dim), and (items,) which items have a row.
        users, items: (n,) of the training rows.
        num_users: ids are below it.
        size: length d of what the layers give.
    """

    def __init__(self, features: Tensor, present: Tensor, users: Tensor, items: Tensor,
                 num_users: int, size: int):
        super().__init__()
        center, scale = units(features[present & id_mask(items, len(features))])
        features = present[:, None] * (features - center) / scale
        rows = present[items]
        mean = mean_of_items(users[rows], items[rows], num_users, len(features))
        known = torch.bincount(users[rows], minlength=num_users) > 0
        for name, value in (("center", center), ("scale", scale),
                            ("item", features), ("item_present", present[:, None]),
                            ("user", standardized(mean @ features, known)),
                            ("user_present", known[:, None])):
            self.register_buffer(name, value, persistent=False)
        self.item_layer = nn.Linear(features.shape[1], size)
        self.user_layer = nn.Linear(features.shape[1], size)

    def of_items(self, item: Tensor) -> Tensor:
        """(b, d): relu of the layer of items' features, zero without features."""
        return self.item_present[item] * self.item_layer(self.item[item]).relu()

    def of_new_items(self, values: Tensor, present: Tensor) -> Tensor:
        """(m, d): the same of features (m, dim) of items outside of the data set, and of which have some
        (m,)."""
        return present[:, None] * self.item_layer((values - self.center) / self.scale).relu()

    def of_users(self, user: Tensor) -> Tensor:
        """(b, d): relu of the layer of the means of users' items, zero without such items."""
        return self.user_present[user] * self.user_layer(self.user[user]).relu()


def _present(missing: Tensor, policy: str) -> Tensor:
    present = ~missing if policy == "drop_item" else torch.ones_like(missing)
    present[0] = False
    return present


def standardized(matrix: Tensor, rows: Tensor) -> Tensor:
    """Columns centred and scaled over the marked rows (n,) of (n, d), all other rows zero."""
    center, scale = units(matrix[rows])
    return rows[:, None] * (matrix - center) / scale


def units(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and standard deviation (d,) of the columns of (n, d); without a row 0 and infinity, which
    make everything 0."""
    if not len(matrix):
        return matrix.new_zeros(matrix.shape[1]), matrix.new_full((matrix.shape[1],), torch.inf)
    return matrix.mean(0), matrix.std(0, correction=0).clamp(min=1e-6)


def keyed_laplace(keys: Tensor, dim: int, seed: int, scale: float) -> Tensor:
    """Laplace noise (n, dim) in float64 around 0, a function of (seed, key, column)."""
    # Half a unit keeps the logarithm finite.
    centred = keyed_uniform(keys, dim, seed, torch.float64) + 2.0**-25 - 0.5
    return -scale * centred.sign() * torch.log1p(-2 * centred.abs())


def intra_domain_loss(common: Tensor, specific: Tensor, common_view: Tensor, specific_view: Tensor,
                      temperature: float) -> Tensor:
    """Two views (b, k) of the parts of users in one domain: c with c, s with s, against c with s."""
    positive = [(common, common_view), (specific, specific_view)]
    negative = [(common, specific), (common, specific_view), (specific, common_view),
                (specific_view, common_view)]
    return _contrast(positive, negative, temperature)


def inter_domain_loss(source_common: Tensor, source_specific: Tensor, target_common: Tensor,
                      target_specific: Tensor, temperature: float) -> Tensor:
    """The parts (b, k) of the same users in two domains: c with c, against s."""
    return _contrast([(source_common, target_common)],
                     [(source_common, target_specific), (source_specific, target_specific)],
                     temperature)


def _contrast(positive: list[Parts], negative: list[Parts], temperature: float) -> Tensor:
    """Mean over users of -log(P / (P + N)), sums of exp(cosine / temperature) over the pairs."""
    cosines = torch.stack([functional.cosine_similarity(*pair) for pair in positive + negative])
    logits = cosines / temperature
    return (logits.logsumexp(0) - logits[:len(positive)].logsumexp(0)).mean()
