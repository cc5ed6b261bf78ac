"""VBPR: its contract, and its scores, loss and gradients by slow loops."""

import numpy as np
import pytest
import torch
from contract import RankingContract
from ranking_by_hand import (
    MODALITIES,
    assert_gradients,
    bpr_by_hand,
    projected_by_hand,
    scores_by_model,
    toy_builder,
    weights_of,
)

from recbole_mmdiff.model.negative_sampling import SAMPLERS


class TestVBPR(RankingContract):
    """Two tastes."""

    model = "VBPR"
    keys = {"embedding_size": 8}
    accurate_keys = {"epochs": 40, "learning_rate": 0.02}
    least_ndcg_ratio = 3.5


class TestVBPRWithoutBiases(TestVBPR):
    """The public toolbox's form, and negatives that depend on the model's vectors."""

    keys = {**TestVBPR.keys, "biases": False, "negative_sampler": "mixgcf", "num_negatives": 2}


@pytest.fixture(scope="module")
def built(build_toy, toy_domain, tmp_path_factory):
    return toy_builder("VBPR", build_toy, toy_domain, tmp_path_factory.mktemp("vbpr"), reg_weight=0.3)


def score(weights, shown, user, item):
    """gamma_u gamma_i + theta_u E f_i, and biases where there are any; ``shown`` (modalities, items, k)."""
    size = weights["user_embedding.weight"].shape[1]
    found = weights["user_embedding.weight"][user] @ weights["item_embedding.weight"][item] \
        + sum(weights["user_tastes.weight"][user] @ part[item][:size] for part in shown)
    if weights["item_bias.weight"].size:
        found += weights["item_bias.weight"][item, 0] + sum(part[item][size] for part in shown)
    return found


def shown_by_hand(model, weights):
    return [projected_by_hand(model, weights, number) for number in range(len(model.features.names))]


def loss_by_hand(model, weights, batch):
    shown = shown_by_hand(model, weights)
    terms, lengths = [], {"user": [], "positive": [], "negative": []}

    def length(item):
        parts = [weights["item_embedding.weight"][item], weights["item_bias.weight"][item],
                 sum(part[item] for part in shown)]
        return sum((part**2).sum() for part in parts)

    for user, positive, negatives in zip(batch.users.tolist(), batch.positives.tolist(),
                                         batch.negatives.items.tolist(), strict=True):
        terms += [np.log1p(np.exp(score(weights, shown, user, other) - score(weights, shown, user, positive)))
                  for other in negatives]
        lengths["user"].append((weights["user_embedding.weight"][user]**2).sum()
                               + (weights["user_tastes.weight"][user]**2).sum())
        lengths["positive"].append(length(positive))
        lengths["negative"] += [length(other) for other in negatives]
    return np.mean(terms) + 0.3 * sum(np.mean(kind) for kind in lengths.values()) / 2


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("modalities", MODALITIES)
def test_scores_by_hand(modalities, biases, built):
    model, train, _ = built(modalities=modalities, biases=biases)
    weights = weights_of(model)
    shown = shown_by_hand(model, weights)
    expected = np.array([[score(weights, shown, user, item) for item in range(train.item_num)]
                         for user in range(train.user_num)])
    trained = model.is_trained.numpy()
    assert not trained.all()
    expected[~trained] = expected[trained].mean(0)
    np.testing.assert_allclose(scores_by_model(model, train), expected, atol=1e-9)


@pytest.mark.parametrize(("biases", "negatives"), [(True, 1), (False, 2)])
@pytest.mark.parametrize("modalities", MODALITIES)
def test_loss_and_gradients_by_hand(modalities, biases, negatives, built):
    model, _, batch = built(modalities=modalities, biases=biases, num_negatives=negatives)
    drawn = model.triples(batch, None)
    loss, weights = model.ranking_loss(batch), weights_of(model)
    assert loss.item() == pytest.approx(loss_by_hand(model, weights, drawn), rel=1e-6)
    loss.backward()
    tables = [model.features.table(number).clone() for number in range(len(modalities))]
    assert_gradients(model, weights, lambda: loss_by_hand(model, weights, drawn))
    assert all(torch.equal(table, model.features.table(number)) for number, table in enumerate(tables))


def test_mixed_negatives_by_hand(built):
    """MixGCF's vectors take the place of the items', in the penalty too, and pass their gradient on."""
    model, _, batch = built(negative_sampler="mixgcf", num_negatives=2, biases=True)
    drawn = model.triples(batch, model.representations())
    users, items = model.representations()[:2]
    terms = [term for user, item, vectors in zip(
        users[drawn.users].detach().numpy(), items[drawn.positives].detach().numpy(),
        drawn.negatives.vectors.detach().numpy(), strict=True) for term in bpr_by_hand(user, item, vectors)]
    ones = users[drawn.users].detach().square().sum(-1) - 2
    penalty = 0.3 * sum(part.mean() for part in (
        ones, items[drawn.positives].square().sum(-1), drawn.negatives.vectors.square().sum(-1))) / 2
    loss = model.ranking_loss(batch)
    assert loss.item() == pytest.approx(np.mean(terms) + penalty.item(), rel=1e-6)
    loss.backward()
    assert all(value.grad.any() for value in model.parameters())


def test_features_of_the_batch_alone_are_projected(built, monkeypatch):
    seen = []
    for name in ("uniform", "dns"):
        model, _, batch = built(negative_sampler=name)
        real = model.features.project
        monkeypatch.setattr(model.features, "project",
                            lambda items, real=real: seen.append(items) or real(items))
        model.ranking_loss(batch)
        if name == "uniform":
            triples = model.triples(batch, None)
            assert len(seen) == 1 and torch.equal(seen[0], torch.unique(triples.items()))
        else:
            assert len(seen) == 3 and len(seen[1]) == model.n_items


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler(name, built):
    model, _, batch = built(negative_sampler=name, num_negatives=2)
    loss = model.ranking_loss(batch)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(value.grad).all() for value in model.parameters())


def test_an_item_without_features_is_its_id(built):
    model = built(modalities=["image", "text"]).model
    bare = ~model.features.present.any(1)
    bare[0] = False
    assert bare.sum() == 1
    vectors = model.item_vectors(bare.nonzero()[:, 0])
    assert not vectors[:, model.size + model.num_biases:].any()
    assert torch.equal(vectors[:, :model.size], model.item_embedding.weight[bare])
