"""Short runs on the tiny pair of domains, for the tests of several rooms."""

import json
from pathlib import Path

import numpy as np
import torch

from recbole_mmdiff.quick_start import run

#: a handful of epochs of small batches: about a second
SHORT = {"epochs": 3, "train_batch_size": 256, "eval_batch_size": 256, "topk": [5, 10],
         "valid_metric": "ranking_full.NDCG@10", "log_tensorboard": False,
         "show_progress": False, "state": "WARNING", "seed": 7}
#: for the models that pretrain their embeddings
SHORT_TRANSFER = {"pretrain_epochs": 3, "pretrain_batch_size": 256}


def pair_keys(folder, **keys) -> dict:
    """The keys of a short run on the pair ``src`` -> ``tgt`` in ``folder``."""
    return {**SHORT, "data_path": str(folder), "source_domain": {"dataset": "src"},
            "target_domain": {"dataset": "tgt"}, **keys}


def single_keys(folder, **keys) -> dict:
    """The keys of a short run on the target domain alone, split by ratio."""
    columns = ["user_id", "item_id", "rating", "timestamp"]
    return {**SHORT, "data_path": str(folder), "load_col": {"inter": columns},
            "metrics": ["NDCG", "Recall", "Hit"], **keys}


def run_pair(model, folder, output, **keys):
    """A finished run on the pair."""
    return run(model, "tiny", config_dict=pair_keys(folder, **keys), output=output)


def run_single(model, folder, output, **keys):
    """A finished run on the target domain alone."""
    return run(model, "tgt", config_dict=single_keys(folder, **keys), output=output)


def without_times(metrics: dict) -> dict:
    """``metrics.json`` without what a clock wrote, in its JSON form."""
    metrics = json.loads(json.dumps(metrics))
    metrics.pop("seconds")
    for entry in metrics["history"]:
        entry.pop("seconds")
    return metrics


def saved_metrics(folder) -> dict:
    """``metrics.json`` of a run folder without times."""
    return without_times(json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8")))


def assert_equal_states(first: dict, second: dict) -> None:
    """Two state dictionaries are equal bit for bit."""
    assert list(first) == list(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs"


def item_mean_rmse(parts) -> float:
    """RMSE on the test rows of the item mean over training rows (the global mean where none)."""
    item = parts.observed.inter_feat[parts.observed.iid_field].numpy()
    rating = parts.observed.ratings.double().numpy()
    means = np.full(parts.test.item_num, rating.mean())
    for number in np.unique(item):
        means[number] = rating[item == number].mean()
    test = parts.test.inter_feat[parts.test.iid_field].numpy()
    return float(np.sqrt(np.mean((means[test] - parts.test.ratings.double().numpy())**2)))
