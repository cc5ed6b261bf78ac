"""MMGCN: its contract, and its graphs, loss and gradients by slow loops."""

import numpy as np
import pytest
import torch
from contract import RankingContract
from ranking_by_hand import (
    MODALITIES,
    assert_gradients,
    bpr_by_hand,
    projected_by_hand,
    scores_by_hand,
    scores_by_model,
    toy_builder,
    training_pairs,
    weights_of,
)

from recbole_mmdiff.errors import ConfigError


class TestMMGCN(RankingContract):
    """A graph for each modality."""

    model = "MMGCN"
    keys = {"embedding_size": 8, "latent_size": 8}
    accurate_keys = {"epochs": 30, "learning_rate": 0.01}
    least_ndcg_ratio = 3.5


class TestMMGCNWithHardNegatives(TestMMGCN):
    """Negatives that depend on the model's vectors."""

    keys = {**TestMMGCN.keys, "negative_sampler": "dns", "negative_candidates": 2}
    least_ndcg_ratio = 3.0


@pytest.fixture(scope="module")
def built(build_toy, toy_domain, tmp_path_factory):
    return toy_builder("MMGCN", build_toy, toy_domain, tmp_path_factory.mktemp("mmgcn"), latent_size=4,
                       num_layers=2, reg_weight=0.3)


def leaky(values):
    return np.where(values > 0, values, 0.01 * values)


def vectors_by_hand(toy, weights):
    """Users and items, node by node and edge by edge."""
    model, train = toy.model, toy.train
    near = {node: [] for node in range(train.user_num + train.item_num)}
    for user, item in training_pairs(train):
        near[user].append(train.user_num + item)
        near[train.user_num + item].append(user)
    ids = np.concatenate([weights["user_embedding.weight"], weights["item_embedding.weight"]])
    outputs = []
    for number in range(len(model.features.names)):
        nodes = np.concatenate([weights[f"preferences.{number}.weight"],
                                projected_by_hand(model, weights, number)])
        nodes = np.stack([row / max(np.linalg.norm(row), 1e-12) for row in nodes])
        for layer in range(len(model.layers)):
            def linear(kind, vector, name=f"layers.{layer}.{number}"):
                return weights[f"{name}.{kind}.weight"] @ vector + weights.get(f"{name}.{kind}.bias", 0.0)

            following = []
            for node, others in near.items():
                mean = sum(nodes[other] for other in others) / max(len(others), 1) + np.zeros(nodes.shape[1])
                told = leaky(linear("message", mean))
                own = leaky(linear("own", nodes[node]))
                following.append(leaky(linear("joined", told) + own + ids[node]))
            nodes = np.stack(following)
        outputs.append(nodes)
    return np.split(np.mean(outputs, 0), [train.user_num])


def loss_by_hand(toy, weights, drawn):
    users, items = vectors_by_hand(toy, weights)
    terms, of_users, of_items = [], [], []
    for user, positive, negatives in zip(drawn.users.tolist(), drawn.positives.tolist(),
                                         drawn.negatives.items.tolist(), strict=True):
        terms += bpr_by_hand(users[user], items[positive], items[negatives])
        of_users.append((weights["user_embedding.weight"][user]**2).sum() + sum(
            (weights[f"preferences.{number}.weight"][user]**2).sum()
            for number in range(len(toy.model.features.names))))
        of_items += [(weights["item_embedding.weight"][item]**2).sum() for item in [positive, *negatives]]
    return np.mean(terms) + 0.3 * (np.mean(of_users) + np.mean(of_items)) / 2


@pytest.mark.parametrize(("layers", "negatives"), [(1, 2), (3, 1)])
@pytest.mark.parametrize("modalities", MODALITIES)
def test_loss_and_gradients_by_hand(modalities, layers, negatives, built):
    """All is trained: preferences and id vectors, too."""
    toy = built(modalities=modalities, num_layers=layers, num_negatives=negatives)
    drawn = toy.model.triples(toy.batch, None)
    loss, weights = toy.model.ranking_loss(toy.batch), weights_of(toy.model)
    assert loss.item() == pytest.approx(loss_by_hand(toy, weights, drawn), rel=1e-6)
    loss.backward()
    assert_gradients(toy.model, weights, lambda: loss_by_hand(toy, weights, drawn))


@pytest.mark.parametrize("modalities", MODALITIES)
def test_scores_by_hand(modalities, built):
    toy = built(modalities=modalities)
    expected = scores_by_hand(*vectors_by_hand(toy, weights_of(toy.model)), toy.train)
    np.testing.assert_allclose(scores_by_model(toy.model, toy.train), expected, atol=1e-6)


def test_no_penalty_reads_no_table(built):
    toy = built(reg_weight=0.0)
    assert toy.model.auxiliary_loss(None, None) == 0.0
    assert torch.isfinite(toy.model.ranking_loss(toy.batch))


@pytest.mark.parametrize("key", ["num_layers", "latent_size", "embedding_size"])
def test_errors_name_the_key(key, built):
    with pytest.raises(ConfigError, match=rf"^{key}: 0 is too small"):
        built(**{key: 0})
