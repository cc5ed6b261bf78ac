"""The features of a domain's items and users, in the order of their ids, as tensors for a model."""

from collections.abc import Sequence

import torch
from recbole.data.dataset import Dataset
from torch import Tensor

from recbole_mmdiff.data.features import FeatureFile, find_modalities
from recbole_mmdiff.data.ids import ids_with_rows
from recbole_mmdiff.errors import ConfigError, DataError


def item_modality_names(*datasets: Dataset) -> list[str]:
    """The modalities of items that the folders of all of these domains hold, in order of names."""
    folders = [(dataset.dataset_path, dataset.dataset_name) for dataset in datasets]
    return [name for name in sorted(set.intersection(*(set(find_modalities(*f)) for f in folders)))
            if all(FeatureFile.open(*folder, name).entity != "user" for folder in folders)]


def item_modalities(dataset: Dataset, names: Sequence[str],
                    policy: str = "drop_item") -> dict[str, tuple[Tensor, Tensor]]:
    """Features of all items of one domain.

    The triples ``<dataset>.<modality>.npy``, ``.tokens`` and ``.json`` are looked for beside the
    domain's ``.inter`` file.

    Args:
        dataset: of one domain, e.g. a cross-domain data set or its ``.source``.
        names: the modalities, as in the names of the files.
        policy: what an item without a row is given, one of ``features.POLICIES``; ``drop_item``
            gives zeros and leaves it to the caller to leave the item out. ``mean`` is that of the
            items in an interaction of ``dataset``, so that a training part's tells of no other.

    Returns:
        modality -> (features (n_items, dim) float32, missing (n_items,) bool), row 0 is [PAD].

    Raises:
        ConfigError: a modality twice.
        FeatureError (a DataError): a file is missing or broken (it names the folder, the files and
            what is there), the policy is unknown, no item has a row, or some have none under
            ``error``.
    """
    return _modalities(dataset, names, policy, dataset.iid_field, "item")


def user_modalities(dataset: Dataset, names: Sequence[str],
                    policy: str = "drop_item") -> dict[str, tuple[Tensor, Tensor]]:
    """Features of all users of one domain, in the order of the ids that both domains share.

    A user is looked for under the token that it has in this domain. Users without a row in
    ``dataset`` (held out of a part for training, or not of this domain) are missing and zero.

    Args and returns are those of ``item_modalities``; ``drop_item`` gives zeros.

    Raises:
        as ``item_modalities``; DataError also if features made of reviews may tell what the split of
            ``dataset`` holds out (its part for training knows the split). Under
            ``cold_start_users`` a user's reviews are held out all or none, so that features of the
            user made of all of them will do, unless their encoder is fitted to data.
    """
    features = _modalities(dataset, names, policy, dataset.uid_field, "user")
    rated = ids_with_rows(dataset, dataset.uid_field)
    rated[0] = True     # Padding misses nothing.
    return {name: (values * rated[:, None], missing | ~rated)
            for name, (values, missing) in features.items()}


def _modalities(dataset: Dataset, names: Sequence[str], policy: str, field: str,
                entity: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Of the ids of ``field``, which are those of an ``entity``."""
    tokens = [str(token) for token in dataset.field2id_token[field]]
    seen = ids_with_rows(dataset, field)
    twice = {name for name in names if list(names).count(name) > 1}
    if twice:
        raise ConfigError(f"modalities: {sorted(twice)[0]!r} stands there twice; name it once")
    features = {}
    for name in names:
        file = FeatureFile.open(dataset.dataset_path, dataset.dataset_name, name)
        if (file.entity or "item") != entity:
            raise DataError(f"{file.path}: holds features of {file.entity or 'item'}s, where features of "
                            f"{entity}s are wanted; choose another modality than {name!r}")
        _refuse_leaks(file, dataset)
        dataset.features_read[name] = field
        aligned = file.align(tokens, policy)
        values, missing = torch.from_numpy(aligned.matrix), torch.from_numpy(aligned.missing)
        if policy == "mean" and (seen & ~missing).any():
            values[missing] = values[seen & ~missing].mean(0)
        features[name] = (values, missing)
    return features


def _refuse_leaks(file: FeatureFile, dataset: Dataset) -> None:
    """Features of reviews must have been made without those of held-out interactions."""
    split = getattr(dataset, "saved_split", None)
    if split is None or file.manifest.get("fields") != ["review"]:
        return
    whole_users = split.protocol == "cold_start_users" and file.entity == "user" \
        and "fitted_on" not in file.manifest
    if "split_digest" not in file.manifest and whole_users:
        return
    if file.manifest.get("split_digest") != split.digest():
        made = "with another split" if "split_digest" in file.manifest else "without a split"
        raise DataError(
            f"{file.path}: was made of reviews {made}, so it may tell what this run holds out; make it "
            f"with prepare encode --split=RUN/split.npz --domain=target (or source), RUN being the folder "
            f"of a run with this split, or give this run the other split as split_file")
