"""The cross-domain data set: the target domain's Dataset, which also carries ``.source``."""

import copy
from pathlib import Path

import numpy as np
import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction

from recbole_mmdiff.data import splits
from recbole_mmdiff.data.domain import DomainDataset, labels_to_parts, select, split_by_recbole
from recbole_mmdiff.data.users import UserVocabulary, keep_links, link_users
from recbole_mmdiff.errors import DataError, one_of


class CrossDomainDataset(DomainDataset):
    """Target-domain Dataset with the source domain at ``.source``; users share one id space.

    ``build()`` gives [train, valid, test], each a view of its own rows. RecBole's samplers,
    loaders, metrics and models take them as they are.

    Attributes:
        source: the source domain's Dataset (all its rows; under ``ratio`` its part of the split).
        vocabulary: the users of both domains.
        num_overlap: linked users; their ids are 1 .. num_overlap in both domains.
        totals: users, items and interactions of each domain before it is split.
        finetune: under ``warm_start``, on the training part: the rows set aside, else None.
        unused: under ``cold_start_items``, on the training part: the rows of held-out users on
            other items and of other users on held-out items, else None.
    """

    finetune: DomainDataset | None = None
    unused: DomainDataset | None = None

    def __init__(self, config):
        super().__init__(config.for_domain("target_domain"))
        self.source = DomainDataset(config.for_domain("source_domain"))
        self.split_seed = config["split_seed"]
        self._saved = None
        if config["split_file"]:
            self._saved = splits.SavedSplit.load(Path(config["split_file"]))
            self.config["split_protocol"] = self._saved.protocol
        self._share_users()

    def _share_users(self):
        config, uid = self.config, self.uid_field
        source, target = self.source.tokens(self.source.uid_field), self.tokens(uid)
        # A .user file may name users without interactions: nobody to learn from or to test.
        links = link_users(self.source.users_of_rows(), self.users_of_rows(),
                           config["user_link_file_path"])
        if self._saved is not None:
            links = self._saved_links(links)
            source_goes, target_goes = self._saved.source_gone, self._saved.target_gone
        else:
            links, source_goes, target_goes = keep_links(
                links, config["overlap_ratio"], config["overlap_mode"], self.split_seed)
        if len(source_goes):
            source = np.setdiff1d(source, source_goes)
            self.source.keep_rows_of(source)
        if len(target_goes):
            target = np.setdiff1d(target, target_goes)
            self.keep_rows_of(target)
        self.vocabulary = UserVocabulary.build(source, target, links)
        self.num_overlap = len(links)
        self.totals = {"source": self.source.count(), "target": self.count()}
        self._gone = {"source_gone": source_goes, "target_gone": target_goes}
        self.source.finish(self.vocabulary.source)
        self.finish(self.vocabulary.target)

    def _saved_links(self, links):
        kept = np.isin(links[:, 1], self._saved.linked)
        if kept.sum() < len(self._saved.linked):
            unknown = np.setdiff1d(self._saved.linked, links[:, 1])[0]
            raise DataError(f"split_file: {self.config['split_file']} links the user {str(unknown)!r}, "
                            f"who is not in both domains")
        return links[kept]

    # ---- splitting ----------------------------------------------------------------------------

    def build(self) -> list["CrossDomainDataset"]:
        """[train, valid, test]; target rows of held-out users are in no training row.

        Raises:
            DataError: unknown protocol, a split that is empty, or a field that it needs.
        """
        protocol = one_of("split_protocol", self.config["split_protocol"], splits.PROTOCOLS)
        files = self.benchmark_filename_list is not None
        if files and protocol != "benchmark":
            raise DataError(f"split_protocol: {protocol} would split again what benchmark_filename "
                            f"splits; set split_protocol: benchmark")
        if self._saved is None and (protocol == "ratio" or files):
            parts = split_by_recbole(lambda: Dataset.build(self), self.split_seed)
        else:
            parts = self._build_by_rows(protocol)
        sources = self._build_sources(protocol)
        for dataset, source in zip(parts, sources, strict=True):
            dataset.source = source
        parts[0].saved_split = self._to_save(parts, sources, protocol)
        if protocol == "ratio":     # There are held-out rows in the source domain, too.
            sources[0].saved_split = parts[0].saved_split
        return parts

    def _build_by_rows(self, protocol: str):
        """The three parts; the first also holds the rows that belong to none of them."""
        self._change_feat_format()
        part = torch.from_numpy(self._divide(protocol))
        splits.check_parts(part.numpy(), protocol)
        parts = [select(self, part == code) for code in (splits.TRAIN, splits.VALID, splits.TEST)]
        if (part == splits.FINETUNE).any():
            parts[0].finetune = select(self, part == splits.FINETUNE)
        if (part == splits.UNUSED).any():
            parts[0].unused = select(self, part == splits.UNUSED)
        return parts

    def _build_sources(self, protocol: str) -> list[DomainDataset]:
        """What of the source domain goes with each part: all of it, or under ``ratio`` a part."""
        source = self.source
        if protocol != "ratio":
            source._change_feat_format()
            return [source] * 3
        if self._saved is None:
            return split_by_recbole(source.build, self.split_seed)
        source._change_feat_format()
        part = torch.from_numpy(self._saved.source_parts(*_row_tokens(source),
                                                         Path(self.config["split_file"])))
        return [select(source, part == code) for code in (splits.TRAIN, splits.VALID, splits.TEST)]

    def _divide(self, protocol: str) -> np.ndarray:
        users, items = (self.inter_feat[f].numpy() for f in (self.uid_field, self.iid_field))
        user_tokens, item_tokens = (self.field2id_token[f]
                                    for f in (self.uid_field, self.iid_field))
        if self._saved is not None:
            return self._saved.parts(*_row_tokens(self), Path(self.config["split_file"]))
        if protocol == "benchmark":
            return labels_to_parts(self).numpy()
        time = self.inter_feat[self.time_field].numpy() if self.time_field in self.inter_feat \
            else None
        overlap = np.arange(len(user_tokens) - 1) < self.num_overlap
        rows = splits.Rows(users - 1, items - 1, user_tokens[1:], item_tokens[1:], overlap, time)
        ratios = [self.config["test_user_ratio"], self.config["valid_user_ratio"]]
        if protocol == "cold_start_items":
            ratios += [self.config["test_item_ratio"], self.config["valid_item_ratio"]]
        return getattr(splits, protocol)(rows, self.split_seed, *ratios)

    def _to_save(self, parts, sources, protocol) -> splits.SavedSplit:
        """What ``split.npz`` of a run folder holds."""
        held_out = {splits.VALID: parts[1], splits.TEST: parts[2],
                    splits.FINETUNE: parts[0].finetune, splits.UNUSED: parts[0].unused}
        pairs = _tokens_and_codes(held_out)
        source = {}
        if protocol == "ratio":
            found = _tokens_and_codes({splits.VALID: sources[1], splits.TEST: sources[2]})
            source = dict(zip(("source_user", "source_item", "source_part"), found, strict=True))
        linked = self.vocabulary.target[1:self.num_overlap + 1]
        return splits.SavedSplit(protocol, linked, *pairs, **source, **self._gone)

    # ---- what models ask for ------------------------------------------------------------------

    def users_with_rows(self) -> torch.Tensor:
        """Ids of the users who have a row here, sorted (n,)."""
        return torch.unique(self.inter_feat[self.uid_field])

    def overlap_users(self) -> torch.Tensor:
        """Ids of the linked users who have rows here and in the source domain, sorted (n,)."""
        users = self.users_with_rows()
        linked = users[users <= self.num_overlap]
        in_source = torch.unique(self.source.inter_feat[self.source.uid_field])
        return linked[torch.isin(linked, in_source)]

    def side_users(self) -> torch.Tensor:
        """Ids of the target-only users (MuSiC's side users) who have rows here, sorted (n,)."""
        users = self.users_with_rows()
        return users[users > self.num_overlap]


def _row_tokens(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """User and item tokens (n,) of all rows."""
    return tuple(dataset.field2id_token[field][dataset.inter_feat[field].numpy()]
                 for field in (dataset.uid_field, dataset.iid_field))


def _tokens_and_codes(held_out: dict[int, Dataset | None]):
    """User tokens, item tokens and part codes (n,) of all rows of some parts."""
    parts = [(code, part) for code, part in held_out.items() if part is not None]
    users, items = zip(*(_row_tokens(part) for _, part in parts), strict=True)
    codes = np.repeat([code for code, _ in parts], [len(part) for _, part in parts])
    return np.concatenate(users), np.concatenate(items), codes


def merged_view(dataset: CrossDomainDataset, with_source_rows: bool) -> CrossDomainDataset:
    """The union of both domains as one data set: target items keep their ids, source items follow.

    Args:
        dataset: a part of a cross-domain data set.
        with_source_rows: whether the source domain's rows are added (training) or only its ids.
    """
    source, uid, iid = dataset.source, dataset.uid_field, dataset.iid_field
    shift = dataset.item_num - 1
    merged = copy.copy(dataset)
    first_source_only = len(dataset.vocabulary.target)
    tokens = {
        uid: _append(dataset.vocabulary.target, dataset.vocabulary.source[first_source_only:]),
        iid: _append(dataset.field2id_token[iid], source.field2id_token[source.iid_field][1:])}
    merged.field2id_token = {**dataset.field2id_token, **tokens}
    merged.field2token_id = {**dataset.field2token_id, **{
        field: {token: i for i, token in enumerate(values)} for field, values in tokens.items()}}
    merged.user_feat = merged.item_feat = None
    merged.feat_name_list = ["inter_feat"]
    if with_source_rows:
        rows = source.inter_feat
        moved = {**rows.interaction, uid: rows[source.uid_field],
                 iid: rows[source.iid_field] + shift}
        common = [field for field in dataset.inter_feat if field in moved]
        merged.inter_feat = Interaction(
            {field: torch.cat([dataset.inter_feat[field], moved[field]]) for field in common})
    return merged


def _append(tokens: np.ndarray, source_tokens: np.ndarray) -> np.ndarray:
    """Both together; a source token that the target has too gets a name of its own."""
    clash = np.isin(source_tokens, tokens)
    source_tokens = source_tokens.astype(str)
    renamed = np.where(clash, np.char.add("source:", source_tokens), source_tokens)
    return np.concatenate([tokens, renamed])
