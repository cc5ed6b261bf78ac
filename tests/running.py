"""Short runs on the tiny pair of domains, for the tests of several rooms."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.features import write_features
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.model.base import StagedRecommender
from recbole_mmdiff.model.pairwise import PairwiseRecommender
from recbole_mmdiff.model.registry import MODELS, get_model
from recbole_mmdiff.quick_start import run
from recbole_mmdiff.trainer import StagedTrainer

#: models that rank in one domain, and all others
RANKING_MODELS = [model for model in MODELS if issubclass(get_model(model), PairwiseRecommender)]
CROSS_MODELS = [model for model in MODELS if model not in RANKING_MODELS]
#: those of the latter that warm start goes on from
FINETUNED_MODELS = [model for model in CROSS_MODELS
                    if get_model(model).finetuning_stage is not StagedRecommender.finetuning_stage]
#: a short pretraining for the models that have one
PRETRAINING = {"pretrain_epochs": 3, "pretrain_batch_size": 256}
#: a base factorisation that is long enough to transfer something
LEARNING = {"pretrain_epochs": 60, "pretrain_learning_rate": 0.01, "reg_weight": 0.02, "epochs": 60,
            "valid_metric": "RMSE"}
#: the forms of the base that every mapping model must work with
BASES = [{"biases": biases, "standardize": standardize}
         for biases in (True, False) for standardize in (True, False)]
#: the target domain of the pair alone, divided by RecBole
SINGLE = {"dataset": "tgt", "source_domain": None, "target_domain": None,
          "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
          "metrics": ["NDCG", "Recall", "Hit"], "split_protocol": "ratio"}
#: the domain of taste groups, whose column tells the split: ranking models learn its high ratings
RANKING = {**SINGLE, "split_protocol": "benchmark", "val_interval": {"rating": "[4,inf)"},
           "load_col": {"inter": ["user_id", "item_id", "rating", "x_label"]}}
#: item without an image, one without any feature
WITHOUT = {"image": {"ti0", "ti1", "si3"}, "text": {"ti0"}}


class Killed(Exception):
    """Stands for whatever ends a process in the middle of its work."""


def run_keys(keys: dict, output, **arguments):
    """A finished run of the ``config_dict`` that ``tiny_config`` gave."""
    return run(config_dict=keys, output=output, **arguments)


def run_in_pieces(keys: dict, folder, count: int, monkeypatch):
    """The same, ended after each of its first ``count`` checkpoints and gone on with each time."""
    save = StagedTrainer._save

    def save_and_die(trainer, loader=None, finished=False):
        save(trainer, loader, finished)
        if not finished:
            raise Killed

    monkeypatch.setattr(StagedTrainer, "_save", save_and_die)
    arguments = {"config_dict": keys, "output": folder}
    for _ in range(count):
        with pytest.raises(Killed):
            run(**arguments)
        arguments = {"resume": folder}
    return run(**arguments)


def write_item_features(pair, dims=(("text", 5), ("image", 3)), without=WITHOUT, signal=0.0) -> None:
    """Triples beside the domains of a pair: noise, plus ``signal`` times a mixture of the looks.

    A domain without rows gets none. ``dims`` are pairs (modality, dimension); ``without``: modality ->
    tokens that have no row.
    """
    draw = np.random.default_rng(3)
    for name, rows in ((pair.source, pair.source_rows), (pair.target, pair.target_rows)):
        tokens = sorted({row[1] for row in rows})
        for modality, dim in dims if tokens else ():
            kept = [token for token in tokens if token not in without.get(modality, ())]
            matrix = draw.normal(2.0, 3.0, size=(len(kept), dim))
            if signal:
                mixture = np.random.default_rng(dim).normal(size=(3, dim))    # The same in both domains.
                matrix += signal * np.stack([pair.looks[token] for token in kept]) @ mixture
            write_features(pair.folder / name, name, modality, kept, matrix.astype(np.float32),
                           encoder="test")


def positive_pairs(domain) -> list[tuple[int, int]]:
    """(user, item) of the rows of a domain with a rating of 4 or 5."""
    return [(user, item) for user, item, rating in zip(
        domain.inter_feat["user_id"].tolist(), domain.inter_feat["item_id"].tolist(),
        domain.ratings.tolist(), strict=True) if rating >= 4]


def contract_of(model: str) -> type:
    """The contract class of a model in tests/model, for the tests of any room."""
    folder = Path(__file__).resolve().parent / "model"
    if str(folder) not in sys.path:     # pytest adds it only where it collects from that room.
        sys.path.insert(0, str(folder))
    for path in sorted(folder.glob("test_*.py")):
        importlib.import_module(path.stem)
    return importlib.import_module("contract").contracts()[model]


def ready_to_transfer(keys: dict, std: float):
    """A mapping model of random float64 weights whose spaces are frozen, and the training part of
    its data, from the ``config_dict`` that ``tiny_config`` gave."""
    torch.manual_seed(4)
    config = Config(config_dict=keys)
    train = prepare_parts(config).train
    model = config.model_class(config, train).double()
    for domain in (model.source, model.target):
        for table in domain.children():
            torch.nn.init.normal_(table.weight, std=std)
    model.seed, model.epoch = 77, 2
    model.freeze_spaces()
    return model, train


def without_times(metrics: dict) -> dict:
    """``metrics.json`` without what a clock wrote, in its JSON form."""
    metrics = json.loads(json.dumps(metrics))
    metrics.pop("seconds")
    metrics.pop("throughput")
    for entry in metrics["history"]:
        entry.pop("seconds")
    return metrics


def saved_metrics(folder) -> dict:
    """``metrics.json`` of a run folder without times."""
    return without_times(json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8")))


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    """Two models hold the same tensors, bit for bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), f"{name} differs"


def item_mean_rmse(parts) -> float:
    """RMSE on the test rows of the item's training mean (of the mean of all where it has none)."""
    item = parts.observed.inter_feat[parts.observed.iid_field].numpy()
    rating = parts.observed.ratings.double().numpy()
    means = np.full(parts.test.item_num, rating.mean())
    for number in np.unique(item):
        means[number] = rating[item == number].mean()
    test = parts.test.inter_feat[parts.test.iid_field].numpy()
    return float(np.sqrt(np.mean((means[test] - parts.test.ratings.double().numpy())**2)))


def slope(function, array, index, step: float = 1e-5) -> float:
    """Central difference of ``function()`` in one number of ``array``."""
    values = []
    for sign in (1, -1):
        array[index] += sign * step
        values.append(function())
        array[index] -= sign * step
    return (values[0] - values[1]) / (2 * step)
