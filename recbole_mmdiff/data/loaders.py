"""What a stage of training iterates."""

import torch
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction

from recbole_mmdiff.diffusion.noise import fold_in, keyed_uniform
from recbole_mmdiff.errors import ConfigError, DataError, one_of
from recbole_mmdiff.negatives import KnownItems

#: what a stage may iterate: interactions, or users
STAGE_DATA = ("target", "source", "overlap_ratings", "overlap_users", "side_users")
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
        self.known = None
        if negatives:
            inter = dataset.inter_feat
            self.known = KnownItems(inter[dataset.uid_field], inter[dataset.iid_field],
                                    dataset.user_num, dataset.item_num)
            full = self.known.counts >= dataset.item_num - 1
            if full.any():
                user = dataset.field2id_token[dataset.uid_field][int(full.nonzero()[0])]
                raise DataError(f"train_neg_ratio: user {str(user)!r} has rated every item, so there "
                                f"is no negative one; set it to 0 or filter such users")

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
        generator = torch.Generator().manual_seed(fold_in(self.seed, self.epoch))
        order = torch.randperm(self.sample_size, generator=generator)
        for index in order.split(self.rows_per_batch):
            yield self.collate_fn(index)

    def __len__(self):
        return -(-self.sample_size // self.rows_per_batch)

    def _with_negatives(self, batch: dict) -> dict:
        uid, iid = self._dataset.uid_field, self._dataset.iid_field
        uniforms = keyed_uniform(batch[SAMPLE_ID], self.negatives,
                                 fold_in(self.seed, self.epoch, 1), torch.float64)
        drawn = self.known.sample_unknown(batch[uid], uniforms).T.reshape(-1)
        copies = {field: values.repeat(self.negatives, *[1] * (values.dim() - 1))
                  for field, values in batch.items()}
        copies[iid] = drawn
        copies[self.config["RATING_FIELD"]] = torch.zeros(len(drawn))
        # A negative row is a sample of its own: its noise must not be its positive's.
        copies[SAMPLE_ID] = copies[SAMPLE_ID] + self.sample_size * (
            1 + torch.arange(self.negatives).repeat_interleave(len(batch[uid])))
        return {field: torch.cat([batch[field], copies[field]]) for field in batch}


def stage_loader(config, dataset: Dataset, data: str, batch_size: int, seed: int) -> StageLoader:
    """The loader of one of ``STAGE_DATA`` over the training part of a data set.

    Raises:
        ConfigError: the kind needs two domains and there is one, or is unknown.
        DataError: there is nothing to iterate.
    """
    one_of("stage data", data, STAGE_DATA)
    if data != "target" and not hasattr(dataset, "source"):
        raise ConfigError(f"{config['model']}: the data {data!r} needs a source and a target domain")
    if data == "source":
        dataset = dataset.source
    negatives = config["train_neg_ratio"] or 0
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
    return StageLoader(config, dataset, rows, batch_size, seed, negatives)
