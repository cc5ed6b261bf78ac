"""From a configuration to the training, validation and test parts of a data set."""

import importlib
from dataclasses import dataclass

import torch
from recbole.data.dataset import Dataset
from recbole.data.utils import get_dataloader
from recbole.sampler import KGSampler, RepeatableSampler, Sampler
from recbole.utils import ModelType

from recbole_mmdiff.data.cross_domain import CrossDomainDataset, merged_view
from recbole_mmdiff.data.domain import StrictDataset, labels_to_parts, select, split_by_recbole
from recbole_mmdiff.data.splits import check_parts
from recbole_mmdiff.errors import ConfigError, DataError, one_of
from recbole_mmdiff.negatives import KnownItems

_DATASET_OF_TYPE = {ModelType.SEQUENTIAL: "SequentialDataset",
                    ModelType.KNOWLEDGE: "KnowledgeBasedDataset"}


@dataclass
class Parts:
    """The three parts of a data set, each a Dataset with its own rows.

    ``train`` is what the model sees (its view, its positives); ``observed`` holds all target
    training rows of the split: what a ranking leaves out, and what makes a user or item warm.
    ``num_overlap`` users are linked to the other domain, by the ids from 1 on; None of one domain.
    """

    train: Dataset
    valid: Dataset
    test: Dataset
    observed: Dataset
    num_overlap: int | None = None

    @property
    def aside(self) -> dict[str, Dataset]:
        """The target rows that the split gives to no part: ``finetune`` and ``unused``, if any."""
        found = {name: getattr(self.observed, name, None) for name in ("finetune", "unused")}
        return {name: part for name, part in found.items() if part is not None}

    def seen_items(self, *others: str) -> KnownItems:
        """What users have rated: the rows of training, those that the split gives to no part, and those
        of ``others`` (``valid``, ``test``)."""
        parts = [self.observed, *self.aside.values(), *(getattr(self, name) for name in others)]
        return KnownItems(*seen_pairs(*parts), self.test.user_num, self.test.item_num)

    def of_source(self) -> "Parts":
        """The same parts of the source domain, which ``ratio`` splits, too."""
        parts = (part.source for part in (self.train, self.valid, self.test, self.observed))
        return Parts(*parts, self.num_overlap)


def create_dataset(config) -> Dataset:
    """The cross-domain data set, or RecBole's class for the model with strict reading."""
    if config.cross_domain:
        return CrossDomainDataset(config)
    module = importlib.import_module("recbole.data.dataset")
    name = _DATASET_OF_TYPE.get(config["MODEL_TYPE"], "Dataset")
    base = getattr(module, f"{config['model']}Dataset", getattr(module, name))
    return type(base.__name__, (SingleDomain, base), {})(config)


class SingleDomain(StrictDataset):
    """Mixin for RecBole's classes: strict reading, and a split by a column ``x_label``."""

    @property
    def num_candidates(self) -> int:
        """Items and [PAD]: what is ranked."""
        return self.item_num

    def build(self):
        """As RecBole splits, or by ``x_label`` (0 train, 1 valid, 2 test: MMRec's files)."""
        protocol = one_of("split_protocol", self.config["split_protocol"], ("ratio", "benchmark"))
        if protocol == "ratio" or self.benchmark_filename_list is not None:
            return split_by_recbole(super().build, self.config["split_seed"])
        self._change_feat_format()
        part = labels_to_parts(self)
        check_parts(part.numpy(), protocol)
        return [select(self, part == code) for code in range(3)]


def prepare_parts(config) -> Parts:
    """Load, split and view the data as the model wants it.

    Raises:
        DataError, ConfigError: as the data set, its split and its view find them.
    """
    dataset = create_dataset(config)
    observed, valid, test = dataset.build()
    train = observed
    _check_ratings(config, observed)
    if config.cross_domain:
        refuse_leaks(observed, valid, test)
    view = config["domain_view"] or getattr(config.model_class, "domain_view", "target")
    one_of("domain_view", view,
           getattr(config.model_class, "domain_views", ("target", "merged")))
    if view == "merged":
        if not config.cross_domain:
            raise ConfigError("domain_view: 'merged' needs a source and a target domain")
        train = merged_view(train, with_source_rows=True)
        valid, test = (merged_view(part, with_source_rows=False) for part in (valid, test))
    if config.cross_domain and not getattr(config.model_class, "predicts_ratings", False):
        train = _positives(train, config)
    return Parts(train, valid, test, observed, getattr(observed, "num_overlap", None))


def _check_ratings(config, observed: Dataset) -> None:
    """A rating model finds ratings in every domain that it learns from."""
    if not getattr(config.model_class, "predicts_ratings", False):
        return
    cls = config.model_class
    reads_source = config.cross_domain and (cls.needs_source or cls.uses_source)
    for dataset in [observed, *([observed.source] if reads_source else [])]:
        if dataset.ratings is None:
            raise DataError(
                f"{dataset.dataset_name}: {config['model']} learns ratings, but the column "
                f"{config['RATING_FIELD']!r} is not there; add it to load_col.inter, or set "
                f"RATING_FIELD to the column that holds them")


def refuse_leaks(observed: CrossDomainDataset, valid: CrossDomainDataset,
                 test: CrossDomainDataset) -> None:
    """Under the cold-start protocols no held-out user has a target training row.

    Raises:
        DataError: one has (a saved split that does not cover the data, say).
    """
    protocol = observed.config["split_protocol"]
    if protocol not in ("cold_start_users", "warm_start", "cold_start_items"):
        return
    train = observed.users_with_rows()
    for name, part in (("validation", valid), ("test", test)):
        leaked = torch.isin(part.users_with_rows(), train)
        if leaked.any():
            raise DataError(
                f"split_protocol {protocol}: {int(leaked.sum())} {name} users have target training "
                f"rows; a split_file must come from the same interactions")


def _positives(train: CrossDomainDataset, config) -> CrossDomainDataset:
    """The training rows of a ranking model. A labelled row of a context model stays."""
    if train.ratings is None:
        return train
    positive = select(train, train.positive_rows())
    if not len(positive):
        raise DataError(f"positive_rating: no training rating reaches "
                        f"{config['positive_rating']}, so {config['model']} has nothing to learn")
    if train.finetune is not None:
        positive.finetune = select(train.finetune, train.finetune.positive_rows())
    return positive


def train_loader(config, train: Dataset):
    """RecBole's own training loader for one of its models, with a sampler of training rows only."""
    arguments = config["train_neg_sample_args"]
    sampler = None
    if arguments["distribution"] != "none":
        kind = RepeatableSampler if config["repeatable"] else Sampler
        data = train if config["repeatable"] else [train]
        try:
            sampler = kind(["train"], data, arguments["distribution"], arguments["alpha"])
        except ValueError as error:     # RecBole: somebody has rated every item
            raise DataError(f"{train.dataset_name}: {error}") from error
        sampler = sampler.set_phase("train")
    loader = get_dataloader(config, "train")
    if config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        kg_sampler = KGSampler(train, arguments["distribution"], arguments["alpha"])
        return loader(config, train, sampler, kg_sampler, shuffle=True)
    return loader(config, train, sampler, shuffle=config["shuffle"])


def seen_pairs(*parts: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Users (n,) and items (n,) of all rows of some parts."""
    users = torch.cat([part.inter_feat[part.uid_field] for part in parts])
    items = torch.cat([part.inter_feat[part.iid_field] for part in parts])
    return users, items
