"""Which negatives a positive row is set against: the key ``negative_sampler``."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from recbole_mmdiff.data.loaders import SAMPLE_ID, NegativeItems
from recbole_mmdiff.diffusion import fold_in, keyed_normal, keyed_uniform
from recbole_mmdiff.errors import at_least, one_of, share
from recbole_mmdiff.model.base import take
from recbole_mmdiff.model.representations import Representations
from recbole_mmdiff.negatives import (
    PopularityNegatives,
    candidate_items,
    curricular_negatives,
    dynamic_negatives,
    mixed_negatives,
    real_hard_negatives,
)

SAMPLERS = ("uniform", "popularity", "dns", "mixgcf", "realhns", "curricular")


class Negatives(NamedTuple):
    """Negatives of a batch: items (b, k), and vectors (b, k, d) where they are no items' own."""

    items: Tensor
    vectors: Tensor | None = None


class NegativeSampling:
    """Draws by (seed, epoch, sample), whatever the order of the batches (``curricular``: by batch, too).

    ``uniform`` and ``popularity`` draw among the items that the user has in no training row. Of
    ``negative_candidates`` such items, ``dns`` takes the one with the highest score, ``mixgcf`` mixes
    vectors, ``realhns`` leaves out those most similar to the positive and draws among the hardest of
    the rest. ``curricular`` draws what is most similar to the positive in a pool of item vectors, but
    for the first of several negatives, which stays uniform. The pools of a model without diffusion are
    its own item vectors with noise of three, two, one and no standard deviations.

    Args:
        config: the keys of section "Negatives" of ``overall.yaml``.
        dataset: the training part.

    Raises:
        ConfigError: a value that is not accepted.
        DataError: a user has all items.
    """

    def __init__(self, config, dataset):
        self.name = one_of("negative_sampler", config["negative_sampler"] or "uniform", SAMPLERS)
        self.count, self.num_candidates = config["num_negatives"], config["negative_candidates"]
        for key, value in (("num_negatives", self.count), ("negative_candidates", self.num_candidates)):
            at_least(key, value, 1)
        for key in ("candidate_share", "hard_share", "real_hard_share"):
            at_least(key, config[key], 1e-9)
            share(key, config[key])
        share("filtered_share", config["filtered_share"], below_one=True)
        self.candidate_share, self.hard_share = config["candidate_share"], config["hard_share"]
        self.filtered_share, self.real_hard_share = config["filtered_share"], config["real_hard_share"]
        self.curriculum = Curriculum(config["curriculum_interval"], config["curriculum_end"])
        self.uid, self.iid = dataset.uid_field, dataset.iid_field
        self.unknown = NegativeItems(dataset, dataset.inter_feat)
        self.popularity = None
        if self.name == "popularity":
            counts = torch.bincount(dataset.inter_feat[self.iid], minlength=dataset.item_num)
            self.popularity = PopularityNegatives(
                self.unknown.known, counts[self.unknown.candidates], config["popularity_exponent"])

    @property
    def needs_vectors(self) -> bool:
        """Whether a draw reads the model's vectors."""
        return self.name not in ("uniform", "popularity")

    @torch.no_grad()
    def draw(self, interaction, tables: Representations | None, seed: int, epoch: int) -> Negatives:
        """Negatives of the rows of a batch.

        Args:
            interaction: b positive rows with their ``sample_id``.
            tables: the model's vectors; None will do unless ``needs_vectors``.
            seed, epoch: of the stage.
        """
        for part in filter(None, (self.unknown, self.popularity)):
            part.to(interaction[self.uid].device)
        rows = Rows(interaction[self.uid], interaction[self.iid], interaction[SAMPLE_ID], seed, epoch)
        return getattr(self, f"_{self.name}")(rows, tables)

    def _uniform(self, rows, _tables, count: int | None = None) -> Negatives:
        return Negatives(self.unknown.draw(rows.users, rows.uniforms(0, count or self.count)))

    def _popularity(self, rows, _tables) -> Negatives:
        drawn = self.popularity.draw(rows.users, rows.uniforms(0, self.count))
        return Negatives(self.unknown.candidates[drawn])

    def _candidates(self, rows) -> Tensor:
        """(b, k, m): uniform candidates of each negative."""
        drawn = self._uniform(rows, None, self.count * self.num_candidates).items
        return drawn.view(len(drawn), self.count, self.num_candidates)

    def _dns(self, rows, tables) -> Negatives:
        candidates = self._candidates(rows)
        scores = torch.einsum("bd,bkmd->bkm", tables.users[rows.users], tables.items[candidates])
        return Negatives(dynamic_negatives(scores, candidates))

    def _mixgcf(self, rows, tables) -> Negatives:
        candidates, layers = self._candidates(rows), tables.layers or (tables.items,)
        # One alpha for all candidates: of their own, the one with most of the positive would win.
        uniforms = rows.uniforms(1, len(layers) * self.count).view(-1, self.count, 1, len(layers))
        with torch.enable_grad():
            side_by_side = torch.cat(layers, 1)
            positives, mixed = (take(side_by_side, items).unflatten(-1, (len(layers), -1))
                                for items in (rows.positives, candidates))
            vectors = mixed_negatives(take(tables.users, rows.users), positives, mixed, uniforms)
        return Negatives(candidates[:, :, 0], vectors)

    def _realhns(self, rows, tables) -> Negatives:
        candidates = self._candidates(rows)
        items = functional.normalize(tables.items, dim=-1)
        scores = torch.einsum("bd,bkmd->bkm", tables.users[rows.users], tables.items[candidates])
        similarity = torch.einsum("bd,bkmd->bkm", items[rows.positives], items[candidates])
        return Negatives(real_hard_negatives(scores, similarity, candidates, self.filtered_share,
                                             self.real_hard_share, rows.uniforms(1, self.count)))

    def _curricular(self, rows, tables) -> Negatives:
        noise = max(0, Curriculum.HARDEST - self.curriculum.pool(rows.epoch))
        pool = tables.items
        if noise:
            ids = torch.arange(len(pool), device=pool.device)
            drawn = keyed_normal(ids, pool.shape[1], fold_in(rows.seed, rows.epoch, 5), pool.dtype)
            pool = pool + noise * pool.std() * drawn
        first = self._uniform(rows, None, 1).items[:, :self.count - 1]
        return Negatives(torch.cat([first, self.from_pool(pool, rows, self.count - first.shape[1])], 1))

    def from_pool(self, pool: Tensor, rows: "Rows", count: int) -> Tensor:
        """(b, count): CCDRec's sampler over a pool (n_items, d) of item vectors: of candidates that the
        batch shares, one of those most similar to the positive."""
        items = self.unknown.candidates
        # Drawn for the batch, which its first sample names.
        seed = fold_in(rows.seed, rows.epoch, 2, int(rows.samples[0]))
        drawn = candidate_items(len(items), self.candidate_share, seed, pool.device)
        place = torch.searchsorted(items, rows.positives)
        return items[curricular_negatives(pool[items], self.unknown.known, rows.users, place, drawn,
                                          self.hard_share, rows.uniforms(3, count))]


class Curriculum:
    """CCDRec's Eq. 7: which pool of negatives an epoch draws from, the easiest first.

    Args:
        interval: epochs for each of the first three pools (delta tau).
        end: the last epoch that draws from a pool (tau_end); after it, from final representations.
        first: the epoch that n = 0 stands for; the first pool serves earlier ones, too.

    Raises:
        ConfigError: an interval below 1.
    """

    HARDEST = 3     # the number of the last pool
    FINAL = 4       # what stands for the final representations

    def __init__(self, interval: int, end: int, first: int = 0):
        at_least("curriculum_interval", interval, 1)
        at_least("curriculum_end", end, 0)
        self.interval, self.end, self.first = interval, end, first

    def pool(self, epoch: int) -> int:
        """0 .. 3, the pool of an epoch; ``FINAL`` after the end."""
        if epoch > self.end:
            return self.FINAL
        return min(self.HARDEST, max(0, epoch - self.first) // self.interval)


class Rows(NamedTuple):
    """Positive rows of a batch, each (b,), and what their draws depend on."""

    users: Tensor
    positives: Tensor
    samples: Tensor
    seed: int
    epoch: int

    def uniforms(self, purpose: int, count: int) -> Tensor:
        """(b, count) numbers in [0, 1), float64."""
        return keyed_uniform(self.samples, count, fold_in(self.seed, self.epoch, 1, purpose), torch.float64)
