"""Item features of both domains in one space, and which modalities there are."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_mmdiff.data.features import FeatureFile, find_modalities
from recbole_mmdiff.data.modalities import ids_with_rows, item_modalities
from recbole_mmdiff.errors import ConfigError

BLOCK = 16384   # rows in float64 at once


@dataclass(frozen=True)
class Features:
    """One modality of one domain's items (or users).

    Attributes:
        values: (n, k) float32, a row for each id, zero where there is none.
        known: (n,) bool, whether there is one.
    """

    values: Tensor
    known: Tensor


def shared_modalities(dataset, names: list[str] | None) -> list[str]:
    """The given modalities; with None all of items that the folders of both domains hold, in order of
    names.

    Args:
        dataset: a cross-domain data set.
        names: the key ``modalities``.

    Raises:
        ConfigError: ``names`` is a text.
    """
    if isinstance(names, str):
        raise ConfigError(f"modalities: {names!r} is a text, but a list is wanted, such as [{names}]")
    if names is not None:
        return list(names)
    folders = [(domain.dataset_path, domain.dataset_name) for domain in (dataset, dataset.source)]
    shared = [name for name in sorted(set.intersection(*(set(find_modalities(*f)) for f in folders)))
              if all(FeatureFile.open(*folder, name).entity != "user" for folder in folders)]
    logging.getLogger().info("modalities: %s are in both domains", shared or "none")
    return shared


def shared_item_features(dataset, names: list[str], policy: str,
                         size: int) -> dict[str, dict[str, Features]]:
    """Features of the items of both domains: domain -> modality -> features.

    Args:
        dataset: the training part of a cross-domain data set.
        names: the modalities.
        policy: of items without a row, one of ``features.POLICIES``.
        size: columns are reduced to at most so many principal components, those of the items of
            both domains that stand in a training row; 0 leaves them as they are. Components
            keep their proportions, their mean variance is 1.

    Raises:
        ConfigError: a modality has other dimensions in the other domain.
        FeatureError, DataError: as ``item_modalities``.
    """
    domains = {"target": dataset, "source": dataset.source}
    found = {name: _features(domain, names, policy) for name, domain in domains.items()}
    if not size:
        return found
    seen = {name: ids_with_rows(domain, domain.iid_field) for name, domain in domains.items()}
    for modality in names:
        sizes = {name: found[name][modality].values.shape[1] for name in domains}
        if len(set(sizes.values())) > 1:
            raise ConfigError(f"modalities: {modality!r} has {sizes['source']} dimensions in the source "
                              f"and {sizes['target']} in the target; encode both domains alike")
        used = {name: found[name][modality].known & seen[name] for name in domains}
        mean, axes = principal_axes([found[name][modality].values[used[name]] for name in domains], size)
        for name in domains:
            values, known = found[name][modality].values, found[name][modality].known
            found[name][modality] = Features(((values - mean) @ axes) * known[:, None], known)
    return found


def _features(dataset, names: list[str], policy: str) -> dict[str, Features]:
    features = {}
    for name, (values, missing) in item_modalities(dataset, names, policy).items():
        known = ~missing if policy == "drop_item" else torch.ones_like(missing)
        known[0] = False
        features[name] = Features(values * known[:, None], known)
    return features


def principal_axes(parts: list[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Mean (dim,) and principal axes (dim, k), k = min(size, dim), of the rows of several matrices.

    The axes are scaled alike, so that the projections of the rows have a mean variance of 1; the
    sign of each makes its largest entry positive. An axis along which the rows do not vary is zero:
    it would be any direction. Covariances are summed in float64, in blocks.
    """
    count = sum(len(part) for part in parts)
    mean = sum(part.sum(0, dtype=torch.float64) for part in parts) / max(count, 1)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in parts:
        for block in part.split(BLOCK):
            centred = block.double() - mean
            covariance += centred.T @ centred
    values, vectors = torch.linalg.eigh(covariance / max(count, 1))
    values, axes = values.flip(0)[:size], vectors.flip(1)[:, :size]
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    varies = values > 1e-10 * values[0]
    scale = (values * varies).mean().sqrt().clamp(min=1e-9)
    return mean.float(), (axes * signs * varies / scale).float()
