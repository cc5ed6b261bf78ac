"""What a stage of training iterates."""

import torch
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction

from recbole_mmdiff.diffusion.noise import fold_in, keyed_uniform
from recbole_mmdiff.errors import ConfigError, DataError, one_of
from recbole_mmdiff.negatives import KnownItems

#: what a stage may iterate: interactions, or users
STAGE_DATA = ("target", "source", "overlap_ratings", "overlap_users", "side_users", "finetune",
              "both")
SAMPLE_ID = "sample_id"


class StageLoader(AbstractDataLoader):
    """A RecBole data loader over rows that are already in memory.

    RecBole's TrainDataLoader gathers a batch through Python lists; here a batch is a slice of the
    epoch's permutation. The order depends on (seed, epoch) only, and every row carries its number
    as ``sample_id``, so that noise and negatives can be drawn by (seed, epoch, sample).

    Args:
        config: the run's configuration.
        dataset: the data set that the rows belong to.
        rows: Interaction with tensors of shape (n, ...).
        batch_size: rows in a batch.
        seed: of this stage.
        negatives: number of sampled items with rating 0 appended for each row.
    """

    def __init__(self, config, dataset: Dataset, rows: Interaction, batch_size: int, seed: int,
                 negatives: int = 0):
        self.rows, self.seed, self.epoch = rows, seed, 0
        self.sample_size, self.rows_per_batch = len(rows), batch_size
        self.negatives = negatives
        super().__init__(config, dataset, sampler=None, shuffle=True)
        self.unknown = NegativeItems(dataset, dataset.inter_feat) if negatives else None

    def _init_batch_size_and_step(self):
        self.step = self.rows_per_batch
        self.set_batch_size(self.rows_per_batch)

    def collate_fn(self, index):
        """The batch with these row numbers, negatives included."""
        index = torch.as_tensor(index)
        batch = {field: self.rows[field][index] for field in self.rows}
        batch[SAMPLE_ID] = index
        return Interaction(self._with_negatives(batch) if self.negatives else batch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation (and the negatives) of an epoch."""
        self.epoch = epoch

    def __iter__(self):
        for index in self._permutation(self.sample_size).split(self.rows_per_batch):
            yield self.collate_fn(index)

    def _permutation(self, count: int, *purpose: int) -> torch.Tensor:
        """(count,): the epoch's order of so many things."""
        generator = torch.Generator().manual_seed(fold_in(self.seed, self.epoch, *purpose))
        return torch.randperm(count, generator=generator)

    def __len__(self):
        return -(-self.sample_size // self.rows_per_batch)

    def _with_negatives(self, batch: dict) -> dict:
        uid, iid = self._dataset.uid_field, self._dataset.iid_field
        uniforms = keyed_uniform(batch[SAMPLE_ID], self.negatives,
                                 fold_in(self.seed, self.epoch, 1), torch.float64)
        drawn = self.unknown.draw(batch[uid], uniforms).T.reshape(-1)
        batch.setdefault(self.config["RATING_FIELD"], torch.ones(len(batch[uid])))
        copies = {field: values.repeat(self.negatives, *[1] * (values.dim() - 1))
                  for field, values in batch.items()}
        copies[iid] = drawn
        copies[self.config["RATING_FIELD"]] = torch.zeros(len(drawn))
        # A negative row is a sample of its own: its noise must not be its positive's.
        copies[SAMPLE_ID] = copies[SAMPLE_ID] + self.sample_size * (
            1 + torch.arange(self.negatives).repeat_interleave(len(batch[uid])))
        return {field: torch.cat([batch[field], copies[field]]) for field in batch}


class UserRowsLoader(StageLoader):
    """Batches of users with all of their rows, so that what a loss needs of a user is computed once
    an epoch. Users come in an order by (seed, epoch), rows as in ``StageLoader``.

    Args:
        config, dataset, rows, seed, negatives: as in ``StageLoader``.
        batch_size: users in a batch.
    """

    def __init__(self, config, dataset: Dataset, rows: Interaction, batch_size: int, seed: int,
                 negatives: int = 0):
        super().__init__(config, dataset, rows, batch_size, seed, negatives)
        users = rows[dataset.uid_field]
        self.by_user = torch.argsort(users, stable=True)
        self.counts = torch.unique(users, return_counts=True)[1]
        self.starts = self.counts.cumsum(0) - self.counts

    def __iter__(self):
        for users in self._permutation(len(self.counts)).split(self.rows_per_batch):
            counts = self.counts[users]
            shifts = self.starts[users] - (counts.cumsum(0) - counts)
            places = torch.arange(int(counts.sum())) + shifts.repeat_interleave(counts)
            yield self.collate_fn(self.by_user[places])

    def __len__(self):
        return -(-len(self.counts) // self.rows_per_batch)


class BothDomainsLoader(StageLoader):
    """Rows of both domains in step: a batch holds as many of each, an epoch is the larger domain.

    Each domain has permutations of its own by (seed, epoch); the smaller one begins another as
    often as it runs out, and a row that comes again in an epoch is a sample of its own. Columns of
    the target keep their names, those of the source begin with ``source_``; ``neg_<item>`` and
    ``source_neg_<item>`` (b, negatives) hold sampled items that the user has in no given row.

    Args:
        config: the run's configuration.
        dataset: the target domain, with ``.source``.
        rows: what is iterated of the target and of the source: Interactions of shape (n, ...).
        batch_size: rows of each domain in a batch.
        seed: of this stage.
        negatives: sampled items for each row.
    """

    def __init__(self, config, dataset: Dataset, rows: tuple[Interaction, Interaction],
                 batch_size: int, seed: int, negatives: int = 0):
        super().__init__(config, dataset, max(rows, key=len), batch_size, seed)
        self.negatives = negatives
        unknown = [NegativeItems(domain, part) if negatives else None
                   for domain, part in zip((dataset, dataset.source), rows, strict=True)]
        self.sides = list(zip(("", "source_"), rows, unknown, strict=True))

    def __iter__(self):
        orders = [self._order(number, len(rows)) for number, (_, rows, _) in enumerate(self.sides)]
        for samples in zip(*(order.split(self.rows_per_batch) for order in orders), strict=True):
            yield self.collate_fn(samples)

    def _order(self, number: int, count: int) -> torch.Tensor:
        """The epoch's samples of a domain of ``count`` rows: sample s is row s % count."""
        rounds = []
        for again in range(-(-self.sample_size // count)):
            rounds.append(self._permutation(count, number, again) + again * count)
        return torch.cat(rounds)[:self.sample_size]

    def collate_fn(self, samples):
        """The batch of these samples of the target and of the source."""
        batch = {}
        for number, (prefix, rows, unknown) in enumerate(self.sides):
            sample = torch.as_tensor(samples[number])
            batch |= {prefix + field: rows[field][sample % len(rows)] for field in rows}
            batch[prefix + SAMPLE_ID] = sample
            if unknown is not None:
                uniforms = keyed_uniform(sample, self.negatives,
                                         fold_in(self.seed, self.epoch, 2, number), torch.float64)
                user = batch[prefix + self._dataset.uid_field]
                batch[prefix + self.config["NEG_PREFIX"] + self._dataset.iid_field] = \
                    unknown.draw(user, uniforms)
        return Interaction(batch)


class NegativeItems:
    """Items that a user has in no given row, for sampling.

    Under ``cold_start_items`` only items with a row are drawn: the held-out ones stand in no training
    interaction, not even as negatives.

    Args:
        dataset: of the domain.
        rows: its interactions.

    Raises:
        DataError: a user has rated all items.
    """

    def __init__(self, dataset: Dataset, rows: Interaction):
        users, items = rows[dataset.uid_field], rows[dataset.iid_field]
        self.candidates = torch.arange(dataset.item_num)
        if dataset.config["split_protocol"] == "cold_start_items":
            self.candidates = torch.cat([torch.zeros(1, dtype=torch.int64), torch.unique(items)])
        known = KnownItems(users, torch.searchsorted(self.candidates, items), dataset.user_num,
                           len(self.candidates))
        full = known.counts >= len(self.candidates) - 1
        if full.any():
            user = dataset.field2id_token[dataset.uid_field][int(full.nonzero()[0])]
            remedy = "set train_neg_ratio to 0, or filter" if dataset.config["train_neg_ratio"] else "filter"
            raise DataError(f"{dataset.dataset_name}: user {str(user)!r} has rated every item, so there is "
                            f"no negative one; {remedy} such users")
        self.known = known

    def to(self, device: torch.device) -> "NegativeItems":
        """The same on another device."""
        if self.candidates.device != device:
            self.candidates = self.candidates.to(device)
            self.known.to(device)
        return self

    def draw(self, users: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """(b, k) items, one for each uniform number (b, k) of users (b,)."""
        return self.candidates[self.known.sample_unknown(users, uniforms)]


def rows_of_both_domains(config, dataset: Dataset) -> tuple[Interaction, Interaction]:
    """Training rows of the target and of the source; of a ranking model the positive ones.

    Raises:
        DataError: there is none in the source (of the target's, preparation has seen to it).
    """
    rows, source = dataset.inter_feat, dataset.source
    if getattr(config.model_class, "predicts_ratings", False):
        return rows, source.inter_feat
    positive = source.positive_rows()
    if not positive.any():
        raise DataError(f"positive_rating: no rating of {source.dataset_name} reaches "
                        f"{config['positive_rating']}, so {config['model']} has no source to learn")
    return rows, Interaction({field: source.inter_feat[field][positive]
                              for field in source.inter_feat})


def stage_loader(config, dataset: Dataset, data: str, batch_size: int, seed: int,
                 by_user: bool = False) -> StageLoader:
    """The loader of one of ``STAGE_DATA`` over the training part of a data set; with ``by_user``
    a batch holds all rows of ``batch_size`` users.

    Raises:
        ConfigError: the kind needs two domains and there is one, or is unknown.
        DataError: there is nothing to iterate.
    """
    one_of("stage data", data, STAGE_DATA)
    if data != "target" and not hasattr(dataset, "source"):
        raise ConfigError(f"{config['model']}: the data {data!r} needs a source and a target domain")
    if data in ("source", "finetune"):
        dataset = getattr(dataset, data)
    negatives = config["train_neg_ratio"] or 0
    if data == "both":
        rows = rows_of_both_domains(config, dataset)
        return BothDomainsLoader(config, dataset, rows, batch_size, seed, negatives)
    if data.endswith("users"):
        users = getattr(dataset, data)()
        rows, negatives = Interaction({dataset.uid_field: users}), 0
    else:
        rows = dataset.inter_feat
    if data == "overlap_ratings":
        linked = torch.isin(rows[dataset.uid_field], dataset.overlap_users())
        rows = Interaction({field: rows[field][linked] for field in rows})
    if not len(rows):
        raise DataError(f"{config['model']}: there is no training data of kind {data!r} "
                        f"(no {data.replace('_', ' ')})")
    loader = UserRowsLoader if by_user else StageLoader
    return loader(config, dataset, rows, batch_size, seed, negatives)
