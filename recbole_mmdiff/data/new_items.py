"""Items outside of the data set: their features, beside those of the items that it has."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recbole_mmdiff.data.features import PAD_TOKEN, FeatureError, FeatureFile, find_modalities
from recbole_mmdiff.data.ids import ids_with_rows
from recbole_mmdiff.data.modalities import item_modalities
from recbole_mmdiff.errors import DataError

_SHOWN = 5  # tokens named in a message
#: what features depend on, in a manifest
_ENCODING = ("encoder", "model", "model_sha256", "revision", "pooling", "normalize", "fitted_on")


@dataclass(frozen=True)
class NewItems:
    """Items without an id, and what their features are compared with.

    Attributes:
        tokens: (m,) sorted.
        features: modality -> features (m, dim) float32, and which items lack them (m,).
        known: the same of the data set's items (n_items, dim), (n_items,), as ``item_modalities`` has them.
        policy: of items without a row; it has been followed in both.
    """

    tokens: np.ndarray
    features: dict[str, tuple[Tensor, Tensor]]
    known: dict[str, tuple[Tensor, Tensor]]
    policy: str

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device) -> "NewItems":
        """The same on another device."""
        moved = ({name: tuple(part.to(device) for part in parts) for name, parts in group.items()}
                 for group in (self.features, self.known))
        return NewItems(self.tokens, *moved, self.policy)

    def present(self, missing: Tensor) -> Tensor:
        """Which items (k,) have features, of those that are ``missing`` a row (k,): all whom the policy gives
        some."""
        return ~missing if self.policy == "drop_item" else torch.ones_like(missing)

    def whole(self, name: str) -> tuple[Tensor, Tensor]:
        """Features (n_items + m, dim) of the data set's items and then the new ones, and which of them lack
        a row (n_items + m,)."""
        return tuple(torch.cat(parts) for parts in zip(self.known[name], self.features[name], strict=True))


def read_new_items(folder: Path, dataset, names: list[str], policy: str) -> NewItems:
    """The items of feature files in a folder that the data set does not have.

    Args:
        folder: holds ``<dataset>.<modality>`` as beside the ``.inter`` file; of a modality that it does not
            hold, no item has a row.
        dataset: the training part of the domain; its items are left out.
        names: the modalities that its model reads, one at least.
        policy: of items without a row, one of ``features.POLICIES``; ``mean`` is that of the data set's items
            in an interaction.

    Raises:
        FeatureError (a DataError): no such file, a broken one, or an item without a row under ``error``.
        DataError: features of another length or encoder than the data set's, or no new item.
    """
    held = [name for name in names if name in find_modalities(folder, dataset.dataset_name)]
    files = {name: FeatureFile.open(folder, dataset.dataset_name, name) for name in held or names}
    for name, file in files.items():
        _check_alike(file, FeatureFile.open(dataset.dataset_path, dataset.dataset_name, name))
    given = set().union(*(file.tokens for file in files.values()))
    tokens = sorted(given - set(dataset.field2token_id[dataset.iid_field]))
    if not tokens:
        raise DataError(f"{folder}: all of its {len(given)} items are in the data already; give features of "
                        f"others, or name these with --items")
    known, seen = item_modalities(dataset, names, policy), ids_with_rows(dataset, dataset.iid_field)
    features = {}
    for name in names:
        values, missing = _rows(files.get(name), tokens, known[name][0].shape[1])
        if missing.any():
            _tell_missing(folder, name, np.array(tokens)[missing.numpy()], len(tokens), policy)
        if policy == "mean":
            found = seen & ~known[name][1]
            values[missing] = known[name][0][found].sum(0) / found.sum().clamp(min=1)
        features[name] = values, missing
    return NewItems(np.array(tokens), features, known, policy)


def _tell_missing(folder: Path, name: str, missing: np.ndarray, count: int, policy: str) -> None:
    """Warn of new items without a row in a modality, or refuse them."""
    text = f"{folder}: {len(missing)} of {count} new items have no row of {name!r}: " \
        f"{missing[:_SHOWN].tolist()} (modality_policy: {policy})"
    if policy == "error":
        raise FeatureError(f"{text}; add the rows, or leave the items out")
    logging.getLogger().warning("%s", text)


def _rows(file: FeatureFile | None, tokens: list[str], dim: int) -> tuple[Tensor, Tensor]:
    """Features (m, dim) of tokens, zero without a row, and which have none (m,)."""
    if file is None or not set(tokens) & set(file.tokens):
        return torch.zeros(len(tokens), dim), torch.ones(len(tokens), dtype=torch.bool)
    aligned = file.align([PAD_TOKEN, *tokens], "drop_item")
    return torch.from_numpy(aligned.matrix)[1:], torch.from_numpy(aligned.missing)[1:]


def _check_alike(file: FeatureFile, trained: FeatureFile) -> None:
    """The features of new items come out of the encoder that made those of the training."""
    ours, theirs = file.matrix.shape[1], trained.matrix.shape[1]
    if ours != theirs:
        raise DataError(f"{file.path}: has {ours} dimensions, the features of the training have {theirs}; "
                        f"make it with the same encoder")
    for key in _ENCODING:
        ours, theirs = (part.manifest.get(key) for part in (file, trained))
        if None not in (ours, theirs) and ours != theirs and not _unstated(ours) and not _unstated(theirs):
            raise DataError(f"{file.path}: its manifest says {key}: {ours!r}, that of the training's "
                            f"features {theirs!r}; make it with the same encoder")


def _unstated(value) -> bool:
    return str(value).startswith(("unstated", "not stated"))
