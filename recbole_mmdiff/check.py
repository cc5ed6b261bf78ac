"""``recbole-mmdiff check``: what the data of a configuration hold, before anything is trained."""

from pathlib import Path

import numpy as np
import torch

from recbole_mmdiff.config import Config
from recbole_mmdiff.config.sources import read_yaml
from recbole_mmdiff.data.features import FeatureFile, find_modalities
from recbole_mmdiff.data.preparation import Parts
from recbole_mmdiff.quick_start import prepare_data


def check(model=None, dataset=None, config_files=(), overrides=None) -> str:
    """Users, items, interactions, sparsity, overlap, cold users and items, feature coverage.

    Raises:
        ConfigError, DataError: as a run with this configuration would.
    """
    # The data do not depend on the model; without one, any that takes both views and needs no ratings
    # will do.
    named = model is not None or any("model" in read_yaml(path) for path in config_files)
    config = Config(model if named else "BPR", dataset, list(config_files), overrides=overrides)
    if not named:
        config["positive_rating"] = float("-inf")
    parts = prepare_data(config)
    if not config.cross_domain:
        return "\n".join([_domain_line("data set", parts.test, _totals(parts)),
                          *_features(parts.test), *_split_lines(parts)])
    source = parts.observed.source
    return "\n".join([
        _domain_line("source", source, parts.observed.totals["source"]), *_features(source),
        _domain_line("target", parts.observed, parts.observed.totals["target"]),
        *_features(parts.observed),
        f"overlap: {parts.observed.num_overlap:,} linked users, of whom "
        f"{len(parts.observed.overlap_users()):,} train; target-only (side) users: "
        f"{len(parts.observed.side_users()):,}",
        *_split_lines(parts)])


def _domain_line(role: str, dataset, totals: tuple[int, int, int]) -> str:
    users, items, count = totals
    return (f"{role} {dataset.dataset_name}: {users:,} users, {items:,} items, {count:,} "
            f"interactions, sparsity {1 - count / users / items:.4%}")


def _totals(parts: Parts) -> tuple[int, int, int]:
    rows = (parts.observed, parts.valid, parts.test)
    users, items = (torch.cat([part.inter_feat[field] for part in rows])
                    for field in (parts.test.uid_field, parts.test.iid_field))
    return len(torch.unique(users)), len(torch.unique(items)), len(users)


def _features(dataset) -> list[str]:
    folder, name = Path(dataset.dataset_path), dataset.dataset_name
    fields = {"item": dataset.iid_field, "user": dataset.uid_field}
    lines = []
    for modality in find_modalities(folder, name):
        file = FeatureFile.open(folder, name, modality)
        entity = file.entity or "item"
        tokens = dataset.field2id_token[fields[entity]]
        lines.append(f"  {entity} features {modality} ({file.matrix.shape[1]} dimensions): "
                     f"{file.coverage(tokens)}")
    return lines


def _split_lines(parts: Parts) -> list[str]:
    observed = parts.observed
    lines = [f"split {observed.config['split_protocol']}:"]
    warm_users = np.unique(observed.inter_feat[observed.uid_field].numpy())
    warm_items = np.unique(observed.inter_feat[observed.iid_field].numpy())
    for name, part in (("train", observed), ("valid", parts.valid), ("test", parts.test)):
        users = np.unique(part.inter_feat[part.uid_field].numpy())
        items = np.unique(part.inter_feat[part.iid_field].numpy())
        cold = "" if name == "train" else (
            f", {len(np.setdiff1d(users, warm_users)):,} cold users, "
            f"{len(np.setdiff1d(items, warm_items)):,} cold items")
        lines.append(f"  {name}: {len(part):,} interactions of {len(users):,} users on "
                     f"{len(items):,} items{cold}")
    lines += [f"  {name}: {len(part):,} interactions" for name, part in parts.aside.items()]
    return lines
