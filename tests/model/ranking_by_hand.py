"""Ranking models of float64 numbers on the toy domain, and what they share, by slow loops."""

import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from running import slope

from recbole_mmdiff.data.features import write_features
from recbole_mmdiff.data.loaders import SAMPLE_ID

SEED, EPOCH = 77, 2
#: every second item has no audio
MODALITIES = [["text"], ["image", "text"], ["text", "image", "audio"]]


class Toy(NamedTuple):
    """A model in training, its training part, and a batch of its rows, in which some come twice."""

    model: torch.nn.Module
    train: object
    batch: Interaction


def toy_builder(name, build_toy, toy_domain, folder, **defaults):
    """``build(**keys)``: the toy of a model with drawn weights; ``folder`` gets a third modality."""
    shutil.copytree(toy_domain, folder, dirs_exist_ok=True)
    draw = np.random.default_rng(8)
    write_features(folder / "tgt", "tgt", "audio", [f"i{number}" for number in range(0, 12, 2)],
                   draw.normal(size=(6, 2)).astype(np.float32), encoder="test")

    def build(std=0.7, **keys):
        model, train = build_toy(name, **{**defaults, "data_path": folder, **keys})
        model.double()
        for parameter, value in model.named_parameters():
            if not parameter.startswith("features.table"):
                torch.nn.init.normal_(value, std=std)
        model.seed, model.epoch = SEED, EPOCH
        return Toy(model.train(), train, batch_of(train))

    return build


def batch_of(train, rows=None) -> Interaction:
    """Training rows by their numbers; None is most of them, some twice."""
    count = len(train.inter_feat)
    rows = torch.tensor([*range(0, count, 2), *range(0, count, 3)]) if rows is None else torch.as_tensor(rows)
    return Interaction({field: train.inter_feat[field][rows] for field in ("user_id", "item_id")}
                       | {SAMPLE_ID: torch.arange(len(rows)) * 7 + 3})


def rows_of(batch) -> list[tuple[int, int, int]]:
    """(user, item, sample) of each row."""
    return list(zip(*(batch[field].tolist() for field in ("user_id", "item_id", SAMPLE_ID)), strict=True))


def weights_of(model) -> dict[str, np.ndarray]:
    """Copies of all parameters."""
    return {name: value.detach().numpy().copy() for name, value in model.named_parameters()}


def training_pairs(train) -> set[tuple[int, int]]:
    """(user, item) of the training rows."""
    return set(zip(train.inter_feat["user_id"].tolist(), train.inter_feat["item_id"].tolist(), strict=True))


def dense_adjacency(train, kind: str = "symmetric") -> np.ndarray:
    """Users and items, edge by edge; divided by degrees."""
    count = train.user_num
    matrix = np.zeros((count + train.item_num,) * 2)
    for user, item in training_pairs(train):
        matrix[user, count + item] = matrix[count + item, user] = 1
    degrees = np.maximum(matrix.sum(1), 1)
    return matrix / degrees[:, None] if kind == "random_walk" \
        else matrix / np.sqrt(degrees[:, None] * degrees[None])


def lightgcn(adjacency, users, items, layers: int):
    """The mean of the layers, of users and items."""
    layer = np.concatenate([users, items])
    found = [layer]
    for _ in range(layers):
        layer = adjacency @ layer
        found.append(layer)
    return np.split(np.mean(found, 0), [len(users)])


def projected_by_hand(model, weights, number: int) -> np.ndarray:
    """(n_items, k): one modality's projected features, item by item; zero where it is missing."""
    table = model.features.table(number).detach().numpy()
    weight, bias = (weights[f"features.projections.{number}.{kind}"] for kind in ("weight", "bias"))
    return np.stack([weight @ row + bias if has else np.zeros(len(bias)) for row, has
                     in zip(table, model.features.present[:, number].tolist(), strict=True)])


def cosine(first, second) -> float:
    """Of two vectors; 0 for one of length 0."""
    return float(first @ second / max(np.linalg.norm(first) * np.linalg.norm(second), 1e-12))


def bpr_by_hand(user, positive, negatives) -> list[float]:
    """-log sigmoid(score of the positive - that of each negative), of one row."""
    return [float(np.log1p(np.exp(user @ negative - user @ positive))) for negative in negatives]


def assert_gradients(model, weights, loss_by_hand, untouched=(), rel=1e-4) -> None:
    """The gradient that the model has agrees with the slopes of ``loss_by_hand()``, which reads
    ``weights``, in the largest entry of each parameter and one at random, and is nothing in those
    parameters that are ``untouched``."""
    draw = np.random.default_rng(1)
    for name, parameter in model.named_parameters():
        if name in untouched or not parameter.numel():
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        gradient = parameter.grad.numpy()
        assert gradient.any(), f"{name} learns nothing"
        for flat in (np.abs(gradient).argmax(), draw.integers(gradient.size)):
            place = np.unravel_index(flat, gradient.shape)
            expected = slope(loss_by_hand, weights[name], place)
            assert gradient[place] == pytest.approx(expected, rel=rel, abs=1e-6), f"{name}{place}"


def scores_by_model(model, train) -> np.ndarray:
    """(users, items) by ``full_sort_predict``."""
    users = Interaction({"user_id": torch.arange(train.user_num)})
    return model.eval().full_sort_predict(users).view(train.user_num, -1).numpy()


def scores_by_hand(users, items, train) -> np.ndarray:
    """Inner products; a user without a training row is the mean of the others."""
    trained = np.isin(np.arange(train.user_num), [user for user, _ in training_pairs(train)])
    users = np.where(trained[:, None], users, users[trained].mean(0))
    return np.array([[user @ item for item in items] for user in users])
