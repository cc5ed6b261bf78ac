"""One domain's RecBole Dataset, read strictly and remapped by vocabularies given from outside."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

from recbole_mmdiff.data.atomic import read_atomic, read_header
from recbole_mmdiff.data.features import PAD_TOKEN
from recbole_mmdiff.errors import DataError


class StrictDataset:
    """Mixin before any RecBole Dataset class: atomic files are read by ``read_atomic``.

    RecBole parses with a Python loop and lets malformed lines, empty ratings and missing folders
    pass or end the process; here each is a DataError that names the line.

    Attributes:
        files_read: path -> names of the columns that were loaded of it.
        features_read: modality -> the field whose tokens its rows have, of the features that a model
            has read. Parts share both.
    """

    def _get_preset(self):
        self.files_read: dict[Path, set[str]] = {}
        self.features_read: dict[str, str] = {}
        super()._get_preset()

    def _load_data(self, token, dataset_path):
        known = self._get_download_url("url", allow_none=True)
        if not Path(dataset_path).exists() and not known:
            raise DataError(f"data set {token!r}: there is no folder {dataset_path}; set data_path "
                            f"to the folder that holds {token}/")
        super()._load_data(token, dataset_path)

    def _load_inter_feat(self, token, dataset_path):
        if self.benchmark_filename_list is None:
            path = Path(dataset_path) / f"{token}.inter"
            if not path.is_file():
                raise DataError(f"data set {token!r}: there is no file {path}")
        super()._load_inter_feat(token, dataset_path)

    def _load_feat(self, filepath, source):
        load_col, unload_col = self._get_load_and_unload_col(source)
        if load_col == set():
            return None
        separator, encoding = self.config["field_separator"], self.config["encoding"] or "utf-8"
        columns = [column for column in read_header(Path(filepath), separator, encoding)
                   if (load_col is None or column.name in load_col)
                   and column.name not in (unload_col or ())]
        if not columns:
            self.logger.warning(f"{filepath}: none of its columns is loaded")
            return None
        names = self.files_read[Path(filepath)] = {column.name for column in columns}
        own = {FeatureSource.USER: self.uid_field, FeatureSource.ITEM: self.iid_field}.get(source)
        if own is not None and own not in names:
            raise DataError(f"{filepath}: the column {own!r} is not loaded; the file must hold it, and "
                            f"load_col.{source.value} name it")
        ids = {self.uid_field, self.iid_field}
        interactions = source == FeatureSource.INTERACTION
        required = ids | ({self.config["RATING_FIELD"]} & names) if interactions else ids & names
        frame = read_atomic(Path(filepath), names, required, separator, encoding,
                            categories=tuple(ids & names) if interactions else ())
        for column in columns:
            self._describe(column, source)
            if column.ftype.value.endswith("seq"):
                frame[column.name] = self._split_sequence(frame[column.name], column, filepath)
        return frame[[column.name for column in columns]]

    def _describe(self, column, source):
        if source == "link":
            return
        self.field2source[column.name] = source
        self.field2type[column.name] = column.ftype
        if not column.ftype.value.endswith("seq"):
            self.field2seqlen[column.name] = 1
        if "float" in column.ftype.value:
            self.field2bucketnum[column.name] = 2

    def _split_sequence(self, cells: pd.Series, column, filepath) -> pd.Series:
        kind = str if column.ftype == FeatureType.TOKEN_SEQ else float
        limit = (self.config["seq_len"] or {}).get(column.name)
        separator = self.config["seq_separator"]
        values = []
        for row, cell in cells.fillna("").items():
            try:
                values.append(np.array([kind(word) for word in cell.split(separator) if word][:limit]))
            except ValueError as error:
                raise DataError(f"{filepath}, line {row + 2}: {column.name}: {error}") from error
        self.field2seqlen[column.name] = max(map(len, values))
        return pd.Series(values, index=cells.index, dtype=object)

    def _dataframe_to_interaction(self, data):
        # pandas 3 hands out read-only arrays, which tensors must not share.
        kinds = {FeatureType.TOKEN: np.int64, FeatureType.FLOAT: np.float32}
        plain = {field: kinds.get(self.field2type[field]) for field in data}
        # float32 tells Unix times apart only by minutes: too coarse to order interactions.
        plain[self.time_field] = np.float64
        simple = [field for field in data if plain[field]
                  and field not in self.config["numerical_features"]]
        rest = super()._dataframe_to_interaction(data[[f for f in data if f not in simple]])
        return Interaction({
            field: torch.from_numpy(np.array(data[field], dtype=plain[field]))
            if field in simple else rest[field] for field in data})

    def _filter_inter_by_user_or_item(self):
        before = len(self.inter_feat)
        super()._filter_inter_by_user_or_item()
        lost = before - len(self.inter_feat)
        if lost:
            self.logger.warning(
                f"{self.dataset_name}: {lost} interactions are left out, because their user or item "
                f"is not in the .user or .item file (filter_inter_by_user_or_item)")

    def _filter_by_inter_num(self):
        # "[0,inf)" keeps everybody, but RecBole counts all rows in Python to find that out.
        if {self.config[f"{side}_inter_num_interval"] for side in ("user", "item")} != {"[0,inf)"}:
            super()._filter_by_inter_num()

    @property
    def ratings(self) -> torch.Tensor | None:
        """The rating of every interaction, float (n,), or None where there is none."""
        field = self.config["RATING_FIELD"]
        return self.inter_feat[field] if field in self.inter_feat else None  # noqa: SIM401

    def positive_rows(self) -> torch.Tensor:
        """Mask (n,) of the interactions that count as positive: rating from ``positive_rating``
        up, else label 1, else all."""
        if self.ratings is not None:
            return self.ratings >= self.config["positive_rating"]
        if self.label_field in self.inter_feat:
            return self.inter_feat[self.label_field] > 0
        return torch.ones(len(self.inter_feat), dtype=torch.bool)


def select(dataset: Dataset, rows: torch.Tensor | np.ndarray) -> Dataset:
    """A copy of ``dataset`` with the given interaction rows (mask or indices), not via lists."""
    rows = torch.as_tensor(rows)
    return dataset.copy(Interaction({k: dataset.inter_feat[k][rows] for k in dataset.inter_feat}))


def labels_to_parts(dataset: Dataset) -> torch.Tensor:
    """Column ``x_label`` (MMRec's files) as part codes (n,): 0 train, 1 valid, 2 test.

    Raises:
        DataError: no such column, or another value.
    """
    if "x_label" not in dataset.inter_feat:
        raise DataError("split_protocol benchmark needs benchmark_filename, or a column "
                        "x_label:float (0 train, 1 valid, 2 test) that load_col names")
    label = dataset.inter_feat["x_label"]
    other = ~torch.isin(label, torch.arange(3.0))
    if other.any():
        raise DataError(f"data set {dataset.dataset_name!r}: x_label is {label[other][0].item():g} in "
                        f"{int(other.sum())} rows; 0 (train), 1 (valid) and 2 (test) are known")
    return label.long()


def split_by_recbole(build: Callable[[], list[Dataset]], seed: int) -> list[Dataset]:
    """[train, valid, test] as RecBole splits (``eval_args``); ``seed`` alone decides an order.

    Raises:
        DataError: ``eval_args`` that RecBole does not know, or a part that is empty.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            parts = build()
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise DataError(f"eval_args: RecBole cannot split by it: {error}") from error
    sizes = [len(part) for part in parts]
    if len(sizes) != 3 or 0 in sizes:
        raise DataError(f"eval_args.split: of {parts[0].dataset_name} it gives parts of {sizes} "
                        f"interactions, but training, validation and test must all hold some; use other "
                        f"shares, or users with more rows")
    return parts


class DomainDataset(StrictDataset, Dataset):
    """The data set of one of two domains.

    The constructor loads and filters; ``finish`` gives it its ids, once the users of both domains
    are known. Items are numbered in the order of their tokens and rows are sorted by
    (user, item), so that nothing depends on the order of the file.

    Attributes:
        num_candidates: items and [PAD]; what is ranked, also in the merged view.
    """

    def _data_processing(self):
        self.feat_name_list = self._build_feat_name_list()
        if self.benchmark_filename_list is None:
            self._data_filtering()
        else:
            self._refuse_duplicates()

    def _remove_duplication(self):
        super()._remove_duplication()
        self._refuse_duplicates()

    def _refuse_duplicates(self):
        twice = self.inter_feat.duplicated([self.uid_field, self.iid_field]).to_numpy()
        if twice.any():
            row = int(twice.argmax())
            user, item = (self.inter_feat[f].iloc[row] for f in (self.uid_field, self.iid_field))
            if self.benchmark_filename_list is not None:
                raise DataError(f"{self.dataset_name}: user {user!r} and item {item!r} stand twice in "
                                f"the files of benchmark_filename ({int(twice.sum())} such lines): a "
                                f"row must be in one of them, once")
            raise DataError(
                f"{self.dataset_name}.inter, line {self.inter_feat.index[row] + 2}: user {user!r} "
                f"and item {item!r} stand together a second time ({int(twice.sum())} such lines); "
                f"set rm_dup_inter to 'first' or 'last'")

    def tokens(self, field: str) -> np.ndarray:
        """The sorted tokens of a token field before it is remapped."""
        found = [pd.unique(feat[field].dropna()).astype(str) for feat in self.field2feats(field)]
        return np.unique(np.concatenate(found)).astype(str)

    def users_of_rows(self) -> np.ndarray:
        """The sorted tokens of the users who have interactions, before ``finish``."""
        return np.unique(np.asarray(pd.unique(self.inter_feat[self.uid_field]), dtype=str))

    def count(self) -> tuple[int, int, int]:
        """Users with interactions, items with interactions, interactions; before ``finish``."""
        return (self.inter_feat[self.uid_field].nunique(), self.inter_feat[self.iid_field].nunique(),
                len(self.inter_feat))

    def keep_rows_of(self, users: np.ndarray) -> None:
        """Drop the rows of all users but these (tokens), before ``finish``."""
        kept = self.inter_feat[self.uid_field].isin(users)
        if self.benchmark_filename_list is not None:
            # RecBole cuts the files apart again by their lengths.
            file = np.repeat(np.arange(len(self.file_size_list)), self.file_size_list)
            self.file_size_list = np.bincount(file[kept], minlength=len(self.file_size_list)).tolist()
        self.inter_feat = self.inter_feat[kept]
        if self.user_feat is not None:
            self.user_feat = self.user_feat[self.user_feat[self.uid_field].isin(users)]
        self._reset_index()

    def finish(self, user_tokens: np.ndarray) -> None:
        """Remap and complete the data set.

        Args:
            user_tokens: the token of every user id, [PAD] first; '' where an id belongs to a user
                of the other domain only.
        """
        items = np.concatenate([[PAD_TOKEN], self.tokens(self.iid_field)])
        self._vocabularies = {self.uid_field: user_tokens, self.iid_field: items}
        self.num_candidates = len(items)
        self._remap_ID_all()
        del self._vocabularies
        if self.benchmark_filename_list is None:
            self.inter_feat.sort_values([self.uid_field, self.iid_field], inplace=True,
                                        ignore_index=True)
        self._user_item_feat_preparation()
        self._fill_nan()
        self._set_label_by_threshold()
        self._normalize()
        self._discretization()
        self._preload_weight_matrix()

    def _remap(self, remap_list):
        vocabulary = self._vocabularies.get(remap_list[0][1]) if remap_list else None
        if vocabulary is None:
            return super()._remap(remap_list)
        present = np.flatnonzero(vocabulary != "")
        index = pd.Index(vocabulary[present])
        token_id = {token: i for i, token in enumerate(vocabulary) if token}
        for feat, field, _ in remap_list:
            self.field2id_token[field], self.field2token_id[field] = vocabulary, token_id
            column = feat[field]
            if isinstance(column.dtype, pd.CategoricalDtype):
                places = index.get_indexer(column.cat.categories.astype(str))[column.cat.codes]
            else:
                places = index.get_indexer(column.astype(str))
            feat[field] = present[places]
        return None
