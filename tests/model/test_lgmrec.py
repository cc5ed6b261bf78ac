"""LGMRec: its contract, and its graphs, hyperedges, loss and gradients by slow loops."""

import numpy as np
import pytest
import torch
from contract import RankingContract
from ranking_by_hand import (
    EPOCH,
    MODALITIES,
    SEED,
    assert_gradients,
    bpr_by_hand,
    dense_adjacency,
    projected_by_hand,
    scores_by_hand,
    scores_by_model,
    toy_builder,
    training_pairs,
    weights_of,
)

from recbole_mmdiff.diffusion import fold_in, keyed_uniform
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model import lgmrec


class TestLGMRec(RankingContract):
    """Graphs and hyperedges."""

    model = "LGMRec"
    keys = {"embedding_size": 8}
    accurate_keys = {"epochs": 40, "learning_rate": 0.01}
    least_ndcg_ratio = 3.5


@pytest.fixture(scope="module")
def built(build_toy, toy_domain, tmp_path_factory):
    return toy_builder("LGMRec", build_toy, toy_domain, tmp_path_factory.mktemp("lgmrec"), embedding_size=4,
                       num_hyperedges=3, num_modality_layers=2, contrast_weight=0.5, reg_weight=0.3,
                       global_weight=0.6, num_negatives=2)


def unit(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def softmax(row):
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def memberships_by_hand(toy, scores, number):
    """Noisy and with dropout while training, by node and hyperedge."""
    model, found = toy.model, np.zeros_like(scores)
    nodes = torch.arange(len(scores))

    def drawn(purpose, dtype):
        seed = fold_in(SEED, EPOCH, purpose, 0, number)
        return keyed_uniform(nodes, model.num_hyperedges, seed, dtype).double().numpy()

    uniforms, dropped = drawn(lgmrec._EDGES, torch.float64), drawn(lgmrec._DROPPED, torch.float32)
    for node, row in enumerate(scores):
        if not model.training:
            found[node] = softmax(row / 0.2)
            continue
        found[node] = softmax((row - np.log(-np.log(uniforms[node]))) / 0.2)
        found[node] *= (dropped[node] >= 0.5) / 0.5
    return found


def vectors_by_hand(toy, weights):
    """Users, items, and each modality's global vectors."""
    model, train = toy.model, toy.train
    count, adjacency = train.user_num, dense_adjacency(train)
    owned = {user: sorted(item for other, item in training_pairs(train) if other == user)
             for user in range(count)}
    layers = [np.concatenate([weights["user_embedding.weight"], weights["item_embedding.weight"]])]
    for _ in range(2):
        layers.append(adjacency @ layers[-1])
    ids = sum(layers) / 3
    local, parts = ids.copy(), []
    for number in range(len(model.features.names)):
        projected = projected_by_hand(model, weights, number)
        features, scores = projected[:, :4], projected[:, 4:]
        means, sums = np.zeros((count, 4)), np.zeros((count, 3))
        for user, items in owned.items():
            for item in items:
                means[user] += features[item] / len(items)
                sums[user] += scores[item]
        local += unit(adjacency @ (adjacency @ np.concatenate([means, features])))
        edges = memberships_by_hand(toy, np.concatenate([sums, scores]), number)
        edges[count:] *= model.features.present[:, number, None].numpy()
        users, items = np.zeros((count, 4)), np.zeros((train.item_num, 4))
        for edge in range(3):
            gathered = sum(edges[count + item, edge] * ids[count + item] for item in range(train.item_num))
            users += edges[:count, edge, None] * gathered
            items += edges[count:, edge, None] * gathered
        parts.append(np.concatenate([users, items]))
    return *np.split(local + 0.6 * unit(sum(parts)), [count]), parts


def loss_by_hand(toy, weights, drawn):
    users, items, parts = vectors_by_hand(toy, weights)
    triples = list(zip(drawn.users.tolist(), drawn.positives.tolist(), drawn.negatives.items.tolist(),
                       strict=True))
    terms = [term for user, positive, negatives in triples
             for term in bpr_by_hand(users[user], items[positive], items[negatives])]
    lengths = sum(np.mean([(vectors[row]**2).sum() for row in rows]) for vectors, rows in (
        (users, [user for user, _, _ in triples]), (items, [positive for _, positive, _ in triples]),
        (items, [item for _, _, negatives in triples for item in negatives])))
    total = np.mean(terms) + 0.3 * lengths / 2
    nodes = (sorted({user for user, _, _ in triples}),
             [toy.train.user_num + item for item in sorted({positive for _, positive, _ in triples})])
    for one in range(len(parts)):
        for other in range(one + 1, len(parts)):
            for kind in nodes:
                views = [unit(parts[number][kind]) for number in (one, other)]
                losses = [-np.log(softmax(views[1] @ views[0][place] / 0.2)[place])
                          for place in range(len(kind))]
                total += 0.5 * np.mean(losses)
    return total


@pytest.mark.parametrize("modalities", MODALITIES)
def test_loss_and_gradients_by_hand(modalities, built):
    toy = built(modalities=modalities)
    drawn = toy.model.triples(toy.batch, None)
    loss, weights = toy.model.ranking_loss(toy.batch), weights_of(toy.model)
    assert loss.item() == pytest.approx(loss_by_hand(toy, weights, drawn), rel=1e-6)
    loss.backward()
    assert_gradients(toy.model, weights, lambda: loss_by_hand(toy, weights, drawn))


@pytest.mark.parametrize("modalities", MODALITIES)
def test_scores_by_hand(modalities, built):
    """Without noise or dropout."""
    toy = built(modalities=modalities)
    toy.model.eval()
    expected = scores_by_hand(*vectors_by_hand(toy, weights_of(toy.model))[:2], toy.train)
    np.testing.assert_allclose(scores_by_model(toy.model, toy.train), expected, atol=1e-6)


def test_every_batch_draws_anew(built):
    toy = built()
    first, second = (toy.model.representations().items for _ in range(2))
    assert not torch.equal(first, second)
    toy.model.before_epoch(EPOCH)
    assert torch.equal(toy.model.representations().items, first)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("num_hyperedges", 0, "num_hyperedges: 0 is too small"),
    ("edge_temperature", 0, "edge_temperature: 0 is too small"),
    ("dropout_prob", 1, "dropout_prob: 1 is no share")])
def test_bad_keys(built, key, value, message):
    with pytest.raises(ConfigError, match=message):
        built(**{key: value})
