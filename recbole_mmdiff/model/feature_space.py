"""Item features of both domains in one space, and which modalities there are."""

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recbole_mmdiff.data.ids import ids_with_rows
from recbole_mmdiff.data.modalities import item_modalities, item_modality_names, user_modalities
from recbole_mmdiff.errors import ConfigError

BLOCK = 16384   # rows in float64 at once


@dataclass(frozen=True)
class Features:
    """One modality of one domain's items (or users).

    Attributes:
        values: (n, k) float32, a row for each id, zero where there is none.
        known: (n,) bool, whether there is one.
        center, axes: (dim,) and (dim, k): what was subtracted from the features in the files, and what they
            were then multiplied with; None where they are as in the files.
    """

    values: Tensor
    known: Tensor
    center: Tensor | None = None
    axes: Tensor | None = None

    def of(self, values: Tensor, known: Tensor) -> Tensor:
        """(m, k): the same of other features (m, dim), zero where not ``known`` (m,)."""
        if self.axes is not None:
            values = (values - self.center) @ self.axes
        return values * known[:, None]


def shared_modalities(dataset, names: list[str] | None) -> list[str]:
    """The given modalities; with None all of items that the folders of both domains hold, in order of
    names.

    Args:
        dataset: a cross-domain data set.
        names: the key ``modalities``.
    """
    if names is not None:
        return list(names)
    shared = item_modality_names(dataset, dataset.source)
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
    found = {name: _known(item_modalities(domain, names, policy), policy)
             for name, domain in domains.items()}
    if not size:
        return found
    _check_sizes(found)
    seen = {name: ids_with_rows(domain, domain.iid_field) for name, domain in domains.items()}
    return _reduced(found, seen, size)


def shared_user_features(dataset, names: list[str], size: int) -> dict[str, dict[str, Features]]:
    """Features of the users themselves in both domains, of the ids of the target's users.

    Args and returns are those of ``shared_item_features``, with users in place of items; domains whose
    features have other dimensions are reduced apart.

    Raises:
        ConfigError, FeatureError, DataError: as ``user_modalities``.
    """
    domains = {"target": dataset, "source": dataset.source}
    found = {name: {modality: Features(part.values[:dataset.user_num], part.known[:dataset.user_num])
                    for modality, part in _known(user_modalities(domain, names), "drop_item").items()}
             for name, domain in domains.items()}
    if not size:
        return found
    seen = {name: ids_with_rows(domain, domain.uid_field)[:dataset.user_num]
            for name, domain in domains.items()}
    return _reduced(found, seen, size)


def _known(modalities: dict[str, tuple[Tensor, Tensor]], policy: str) -> dict[str, Features]:
    features = {}
    for name, (values, missing) in modalities.items():
        known = ~missing if policy == "drop_item" else torch.ones_like(missing)
        known[0] = False
        values[~known] = 0.0
        features[name] = Features(values, known)
    return features


def _check_sizes(found: dict[str, dict[str, Features]]) -> None:
    for modality, target in found["target"].items():
        sizes = target.values.shape[1], found["source"][modality].values.shape[1]
        if sizes[0] != sizes[1]:
            raise ConfigError(f"modalities: {modality!r} has {sizes[1]} dimensions in the source and "
                              f"{sizes[0]} in the target; encode both domains alike")


def _reduced(found: dict[str, dict[str, Features]], seen: dict[str, Tensor],
             size: int) -> dict[str, dict[str, Features]]:
    """Features projected on the principal axes of those that are ``seen`` (n,): of both domains
    together, or of each alone where they have other dimensions."""
    reduced: dict[str, dict[str, Features]] = {name: {} for name in found}
    for modality in found["target"]:
        parts = {name: found[name][modality] for name in found}
        alike = len({part.values.shape[1] for part in parts.values()}) == 1
        for group in [list(parts)] if alike else [[name] for name in parts]:
            mean, axes = principal_axes([parts[name].values[parts[name].known & seen[name]]
                                         for name in group], size)
            for name in group:
                values, known = parts[name].values, parts[name].known
                made = Features(values, known, mean, axes)
                reduced[name][modality] = replace(made, values=made.of(values, known))
    return reduced


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
