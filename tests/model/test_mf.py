"""MF: the contract, and its loss by hand."""

import pytest
import torch
from contract import ModelContract
from torch import nn

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.model.factorization import Factorization


class TestMF(ModelContract):
    """It does not transfer: a cold-start user gets about the item mean."""

    model = "MF"
    accurate_keys = {"epochs": 60, "learning_rate": 0.01, "reg_weight": 0.02,
                     "valid_metric": "RMSE"}
    transfers = False
    best_rmse_ratio = 1.05


@pytest.fixture(params=[True, False], ids=["biased", "plain"])
def factorization(request, parts):
    torch.manual_seed(0)
    built = Factorization(parts.train, "rating", 3, request.param, 0.7).double()
    for parameter in built.parameters():
        nn.init.normal_(parameter)
    return built


@pytest.fixture(scope="module")
def parts(tiny_config):
    return prepare_parts(Config(config_dict=tiny_config("MF")))


def by_hand(model, batch, reg_weight):
    """The loss of (user, item, rating) rows in plain Python, and its gradient in p_u."""
    p, q = model.user_embedding.weight.tolist(), model.item_embedding.weight.tolist()
    zeros = [[0.0]] * 1000
    b_u = model.user_bias.weight.tolist() if model.biases else zeros
    b_i = model.item_bias.weight.tolist() if model.biases else zeros
    mu, loss, gradient = model.mean.item(), 0.0, [[0.0] * 3 for _ in p]
    for user, item, rating in batch:
        dot = sum(a * b for a, b in zip(p[user], q[item], strict=True))
        error = rating - (mu + b_u[user][0] + b_i[item][0] + dot)
        squares = sum(a * a for a in p[user] + q[item] + b_u[user] + b_i[item])
        loss += (error**2 + reg_weight * squares) / len(batch)
        for d in range(3):
            gradient[user][d] += (2 * reg_weight * p[user][d] - 2 * error * q[item][d]) / len(batch)
    return loss, gradient


@pytest.mark.parametrize("reg_weight", [0.0, 0.3])
def test_loss_and_gradient_by_hand(factorization, reg_weight):
    batch = [(1, 2, 4.0), (1, 5, 1.0), (3, 2, 5.0), (7, 9, 2.0)]
    user, item, rating = (torch.tensor(column) for column in zip(*batch, strict=True))
    loss = factorization.loss(user, item, rating.double(), reg_weight)
    loss.backward()
    expected, gradient = by_hand(factorization, batch, reg_weight)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    found = factorization.user_embedding.weight.grad
    torch.testing.assert_close(found, torch.tensor(gradient, dtype=torch.float64))


def test_factors_and_offset_make_the_prediction(factorization):
    user, item = torch.tensor([1, 4, 6]), torch.tensor([3, 3, 8])
    parts = (factorization.user_factors(user) * factorization.item_factors(item)).sum(-1)
    torch.testing.assert_close(parts + factorization.item_offset(item), factorization(user, item))
    assert factorization.user_factors(user).shape[1] == factorization.size


def test_mean_and_start(parts):
    built = Factorization(parts.train, "rating", 4, True, 0.1)
    assert built.mean.item() == pytest.approx(parts.train.ratings.double().mean().item())
    assert not built.user_bias.weight.any() and not built.item_bias.weight.any()
    assert 0.08 < built.user_embedding.weight.std().item() < 0.12
    assert Factorization(parts.train, "rating", 4, False, 0.1).mean.item() == 0


def test_negatives_are_extra_rows_with_rating_zero(tiny_config, parts):
    config = Config(config_dict=tiny_config("MF", train_neg_ratio=2))
    batch = next(iter(stage_loader(config, parts.train, "target", 50, seed=1)))
    rating = batch["rating"]
    assert len(rating) == 150 and (rating[:50] > 0).all() and not rating[50:].any()
    known = set(zip(parts.train.inter_feat["user_id"].tolist(),
                    parts.train.inter_feat["item_id"].tolist(), strict=True))
    pairs = list(zip(batch["user_id"].tolist(), batch["item_id"].tolist(), strict=True))
    assert set(pairs[:50]) <= known and not known & set(pairs[50:])
