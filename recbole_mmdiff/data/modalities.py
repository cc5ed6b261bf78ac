"""The item features of a domain, in the order of its item ids, as tensors for a model."""

from collections.abc import Sequence

import torch
from recbole.data.dataset import Dataset
from torch import Tensor

from recbole_mmdiff.data.features import FeatureFile
from recbole_mmdiff.errors import ConfigError


def item_modalities(dataset: Dataset, names: Sequence[str],
                    policy: str = "drop_item") -> dict[str, tuple[Tensor, Tensor]]:
    """Features of all items of one domain.

    The triples ``<dataset>.<modality>.npy``, ``.tokens`` and ``.json`` are looked for beside the
    domain's ``.inter`` file.

    Args:
        dataset: of one domain, e.g. a cross-domain data set or its ``.source``.
        names: the modalities, as in the names of the files.
        policy: what an item without a row is given, one of ``features.POLICIES``; ``drop_item``
            gives zeros and leaves it to the caller to leave the item out.

    Returns:
        modality -> (features (n_items, dim) float32, missing (n_items,) bool), row 0 is [PAD].

    Raises:
        ConfigError: a modality twice.
        FeatureError (a DataError): a file is missing or broken (it names the folder, the files and
            what is there), the policy is unknown, no item has a row, or some have none under
            ``error``.
    """
    twice = {name for name in names if list(names).count(name) > 1}
    if twice:
        raise ConfigError(f"modalities: {sorted(twice)[0]!r} stands there twice; name it once")
    tokens = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
    features = {}
    for name in names:
        file = FeatureFile.open(dataset.dataset_path, dataset.dataset_name, name)
        aligned = file.align(tokens, policy)
        features[name] = (torch.from_numpy(aligned.matrix), torch.from_numpy(aligned.missing))
    return features
