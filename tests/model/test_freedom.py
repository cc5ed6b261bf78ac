"""FREEDOM: its contract, and each of its parts against slow loops in numpy."""

from math import isqrt

import numpy as np
import pytest
import torch
from contract import RankingContract
from recbole.data.interaction import Interaction
from running import slope

from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.item_graph import modality_weights
from recbole_mmdiff.model.negative_sampling import Negatives
from recbole_mmdiff.model.pairwise import Triples, bpr_loss

WEIGHTS = {"image": 0.3, "text": 0.9}


class TestFREEDOM(RankingContract):
    model = "FREEDOM"
    keys = {"embedding_size": 8, "knn_k": 5}
    accurate_keys = {"epochs": 40, "learning_rate": 0.02, "embedding_size": 16}
    least_ndcg_ratio = 3.5

    def test_features_tell_who_likes_a_new_item(self, accurate, taste_domain):
        """It has no training row, but those of its group mostly score it higher than others do."""
        part, new = accurate.parts.test, taste_domain.new
        scores = self.scores(accurate)[1:, part.token2id(part.iid_field, new)]
        own = torch.tensor([taste_domain.taste_of(user) == taste_domain.taste_of(new)
                            for user in part.field2id_token[part.uid_field][1:]])
        assert (scores[own][:, None] > scores[~own]).float().mean() > 0.9


class TestFREEDOMWithTrainedFeatures(TestFREEDOM):
    """Tables of features as parameters, and mirror gradient."""

    keys = {**TestFREEDOM.keys, "train_features": True, "reg_weight": 0.1, "mirror_interval": 3}


class TestFREEDOMWithHardNegatives(TestFREEDOM):
    """Negatives that depend on the model's vectors."""

    keys = {**TestFREEDOM.keys, "negative_sampler": "mixgcf", "num_negatives": 2}


@pytest.fixture(scope="module")
def toy(build_toy):
    """``toy(**keys)``: a model of float64 numbers on the toy domain, and its training part."""

    def build(**keys):
        model, train = build_toy("FREEDOM", **{"modality_weights": WEIGHTS, "knn_k": 3, "reg_weight": 0.5,
                                               **keys})
        model.double()
        model.seed, model.epoch = 99, 2
        return model, train

    return build


# ---- by hand ---------------------------------------------------------------------------------------


def features_by_hand(model):
    """(features (n, dim), present (n,)) of each modality, float64."""
    return [(model.features.table(number).detach().numpy().astype(float),
             model.features.present[:, number].numpy()) for number in range(len(model.features.names))]


def item_graph_by_hand(model, knn_k):
    """S: every item's neighbours by cosine, equally weighted, joined over the modalities it has."""
    weights = [WEIGHTS.get(name, 1.0) for name in model.features.names]
    count = model.n_items
    graph = np.zeros((count, count))
    parts = []
    for values, present in features_by_hand(model):
        lengths = np.sqrt((values**2).sum(1))
        members = [item for item in range(count) if present[item] and lengths[item] > 0]
        found = {}
        for item in members:
            alike = [(other != item,
                      -round(values[item] @ values[other] / lengths[item] / lengths[other], 6), other)
                     for other in members]
            found[item] = [other for *_, other in sorted(alike)[:knn_k]]
        parts.append(found)
    for item in range(count):
        total = sum(weight for weight, found in zip(weights, parts, strict=True) if item in found)
        for weight, found in zip(weights, parts, strict=True):
            for other in found.get(item, []):
                graph[item, other] += weight / total / len(found[item])
    return graph


def adjacency_by_hand(users, items, num_users, num_items):
    """D^-1/2 A D^-1/2 of the distinct pairs."""
    matrix = np.zeros((num_users + num_items,) * 2)
    for user, item in zip(users, items, strict=True):
        matrix[user, num_users + item] = matrix[num_users + item, user] = 1
    degrees = matrix.sum(1)
    for row, column in zip(*matrix.nonzero(), strict=True):
        matrix[row, column] /= np.sqrt(degrees[row] * degrees[column])
    return matrix


def representations_by_hand(users, items, graph, adjacency, num_layers=2, num_item_layers=1):
    """h_u and h_i out of the start vectors."""
    higher = items
    for _ in range(num_item_layers):
        higher = graph @ higher
    layers = [np.concatenate([users, items])]
    for _ in range(num_layers):
        layers.append(adjacency @ layers[-1])
    mean = sum(layers) / len(layers)
    return mean[:len(users)], mean[len(users):] + higher


def bpr_by_hand(users, positives, negatives):
    """Mean of -log sigmoid over rows (b, d) and their negatives (b, k, d)."""
    return np.mean([np.log1p(np.exp(-(user @ positive - user @ negative)))
                    for user, positive, others in zip(users, positives, negatives, strict=True)
                    for negative in others])


def edges_of(matrix, num_users):
    """The (user, item) pairs of a CSR adjacency."""
    dense = matrix.to_dense().numpy()[:num_users, num_users:]
    return list(zip(*(part.tolist() for part in dense.nonzero()), strict=True))


def training_pairs(train):
    return [(int(user), int(item)) for user, item
            in zip(train.inter_feat["user_id"], train.inter_feat["item_id"], strict=True)]


# ---- graphs and representations -------------------------------------------------------------------


@pytest.mark.parametrize("knn_k", [1, 3, 50])
def test_item_graph(toy, knn_k):
    """With an item without any modality, with one, with a text of zeros, and two alike."""
    model, train = toy(knn_k=knn_k)
    ours, by_hand = model.item_graph.to_dense().numpy(), item_graph_by_hand(model, knn_k)
    np.testing.assert_allclose(ours, by_hand, atol=1e-7)
    np.testing.assert_allclose(model.item_graph_transposed.to_dense().numpy(), by_hand.T, atol=1e-7)
    ids = train.token2id("item_id", ["i0", "i1"])
    assert not ours[[0, ids[0]]].any(), "padding, and an item without features, have no neighbours"
    np.testing.assert_allclose(ours[1:].sum(1), np.arange(1, model.n_items) != ids[0], atol=1e-7)
    if knn_k == 3:
        assert len(ours[ids[1]].nonzero()[0]) == 3, "an item without image is all text"


def test_item_graph_of_one_modality_and_without_weights(toy):
    alone, _ = toy(modalities=["text"], modality_weights={})
    np.testing.assert_allclose(alone.item_graph.to_dense().numpy(), item_graph_by_hand(alone, 3), atol=1e-7)
    assert modality_weights(None, ["text", "audio"]) == [1.0, 1.0]
    assert modality_weights({"text": 3}, ["audio", "text"]) == [1.0, 3.0]


@pytest.mark.parametrize(("num_layers", "num_item_layers"), [(1, 1), (2, 1), (3, 2)])
def test_representations_of_the_whole_graph(toy, num_layers, num_item_layers):
    model, train = toy(num_layers=num_layers, num_item_layers=num_item_layers)
    model.eval()
    adjacency = adjacency_by_hand(*zip(*training_pairs(train), strict=True), model.n_users, model.n_items)
    start = [table.weight.detach().numpy() for table in (model.user_embedding, model.item_embedding)]
    users, items = representations_by_hand(*start, item_graph_by_hand(model, 3), adjacency, num_layers,
                                           num_item_layers)
    found = model.representations()
    np.testing.assert_allclose(found.users.detach().numpy(), users, atol=1e-7)
    np.testing.assert_allclose(found.items.detach().numpy(), items, atol=1e-7)
    assert len(found.layers) == num_layers + 1
    torch.testing.assert_close(torch.stack(found.layers).mean(0), found.items)


def test_scores_and_users_without_a_training_row(toy):
    model, train = toy()
    tables = model.eval().representations()
    trained = sorted({user for user, _ in training_pairs(train)})
    cold = train.token2id("user_id", "u6")
    assert cold not in trained
    users = Interaction({"user_id": torch.arange(model.n_users)})
    scores = model.full_sort_predict(users).view(model.n_users, -1)
    for user in range(model.n_users):
        vector = tables.users[user] if user in trained else tables.users[trained].mean(0)
        torch.testing.assert_close(scores[user], tables.items @ vector)
    assert not torch.equal(scores[cold], scores[trained[0]])


# ---- the edges of an epoch -------------------------------------------------------------------------


def test_an_epoch_keeps_a_share_of_the_edges(toy):
    model, train = toy(dropout=0.4)
    model.train()
    whole = sorted(set(training_pairs(train)))
    drawn = []
    for epoch in range(4):
        model.before_epoch(epoch)
        kept = edges_of(model.epoch_adjacency, model.n_users)
        assert set(kept) < set(whole)
        assert len(kept) == int(0.6 * len(whole))
        by_hand = adjacency_by_hand(*zip(*kept, strict=True), model.n_users, model.n_items)
        np.testing.assert_allclose(model.epoch_adjacency.to_dense().numpy(), by_hand, atol=1e-6)
        drawn.append(kept)
    assert len({tuple(kept) for kept in drawn}) == 4
    assert edges_of(model.adjacency, model.n_users) == whole


def test_training_propagates_over_the_epochs_edges_and_evaluation_over_all(toy):
    model, train = toy(dropout=0.4)
    model.train().before_epoch(0)
    start = [table.weight.detach().numpy() for table in (model.user_embedding, model.item_embedding)]
    graph = item_graph_by_hand(model, 3)
    for training, pairs in ((True, edges_of(model.epoch_adjacency, model.n_users)),
                            (False, training_pairs(train))):
        adjacency = adjacency_by_hand(*zip(*pairs, strict=True), model.n_users, model.n_items)
        users, items = representations_by_hand(*start, graph, adjacency)
        found = model.train(training).representations()
        np.testing.assert_allclose(found.users.detach().numpy(), users, atol=1e-6)
        np.testing.assert_allclose(found.items.detach().numpy(), items, atol=1e-6)


def test_the_edges_of_an_epoch_depend_on_seed_and_epoch_alone(toy):
    """So that a resumed run draws them again."""
    (model, _), (again, _) = toy(dropout=0.4), toy(dropout=0.4)
    for epoch in range(5):
        model.before_epoch(epoch)
    torch.rand(3)
    again.before_epoch(4)
    torch.testing.assert_close(model.epoch_adjacency.to_dense(), again.epoch_adjacency.to_dense(),
                               rtol=0, atol=0)
    again.seed = 100
    again.before_epoch(4)
    assert not torch.equal(model.epoch_adjacency.to_dense(), again.epoch_adjacency.to_dense())


def test_popular_edges_are_left_out_more_often(toy):
    """Frequencies over epochs against draws without replacement by 1 / sqrt(d_u d_i)."""
    model, train = toy(dropout=0.5)
    whole = sorted(set(training_pairs(train)))
    counts, rounds = dict.fromkeys(whole, 0), 2000
    for epoch in range(rounds):
        model.before_epoch(epoch)
        for pair in edges_of(model.epoch_adjacency, model.n_users):
            counts[pair] += 1
    users, items = (np.bincount(part) for part in zip(*whole, strict=True))
    weights = np.array([1 / np.sqrt(users[user] * items[item]) for user, item in whole])
    draw = np.random.default_rng(1)
    expected = np.zeros(len(whole))
    for _ in range(rounds):
        expected[draw.choice(len(whole), len(whole) // 2, replace=False, p=weights / weights.sum())] += 1
    ours = np.array(list(counts.values()))
    # Two binomial counts: their difference has a standard deviation below sqrt(rounds / 2).
    assert np.abs(ours - expected).max() < 4.5 * isqrt(rounds // 2)
    assert np.corrcoef(ours, expected)[0, 1] > 0.9


def test_without_dropout_every_epoch_has_the_whole_graph(toy):
    model, _ = toy(dropout=0.0)
    model.before_epoch(0)
    assert model.epoch_adjacency is None


# ---- the loss --------------------------------------------------------------------------------------


def loss_by_hand(model, train, arrays, batch):
    """BPR and the BPR of the modalities in numpy, from the arrays of the weights."""
    adjacency = adjacency_by_hand(*zip(*training_pairs(train), strict=True), model.n_users, model.n_items)
    users, items = representations_by_hand(arrays["user_embedding.weight"], arrays["item_embedding.weight"],
                                           item_graph_by_hand(model, 3), adjacency)
    place, positives, negatives = (part.numpy() for part in (batch.users, batch.positives,
                                                             batch.negatives.items))
    total = bpr_by_hand(users[place], items[positives], items[negatives])
    for number, (values, present) in enumerate(features_by_hand(model)):
        weight = arrays[f"features.projections.{number}.weight"]
        bias = arrays[f"features.projections.{number}.bias"]
        projected = (values @ weight.T + bias) * present[:, None]
        total += model.reg_weight * bpr_by_hand(users[place], projected[positives], projected[negatives])
    return total


def batch_of(train, num_negatives=3):
    """Training rows, some twice, with negatives that also come twice."""
    users, items = zip(*(training_pairs(train)[:6] * 2), strict=True)
    negatives = torch.arange(12 * num_negatives).view(12, num_negatives) * 5 % 12 + 1
    return Triples(torch.tensor(users), torch.tensor(items), Negatives(negatives))


@pytest.mark.parametrize("reg_weight", [0.5, 0.0])
def test_loss_and_gradients(toy, reg_weight):
    model, train = toy(dropout=0.0, reg_weight=reg_weight)
    batch = batch_of(train)
    model.train()
    tables = model.representations()
    loss = bpr_loss(*batch.vectors(tables)) + model.auxiliary_loss(batch, batch.vectors(tables))
    arrays = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}

    def by_hand():
        return loss_by_hand(model, train, arrays, batch)

    assert loss.item() == pytest.approx(by_hand(), rel=1e-6)
    loss.backward()
    for name, parameter in model.named_parameters():
        if not reg_weight and name.startswith("features"):
            assert parameter.grad is None, "nothing is projected"
            continue
        for index in np.ndindex(*parameter.shape):
            assert parameter.grad[index].item() == pytest.approx(slope(by_hand, arrays[name], index),
                                                                 rel=1e-4, abs=1e-6), (name, index)


def test_the_ranking_loss_is_that_of_the_drawn_negatives(toy):
    model, train = toy(dropout=0.0, num_negatives=2)
    model.train()
    rows = {"user_id": train.inter_feat["user_id"][:7], "item_id": train.inter_feat["item_id"][:7],
            "sample_id": torch.arange(7)}
    interaction = Interaction(rows)
    batch = model.triples(interaction, model.representations())
    assert batch.negatives.items.shape == (7, 2) and batch.items().shape == (7, 3)
    assert not {(int(user), int(item)) for user, row in zip(batch.users, batch.negatives.items, strict=True)
                for item in row} & set(training_pairs(train))
    arrays = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    assert model.ranking_loss(interaction).item() == pytest.approx(
        loss_by_hand(model, train, arrays, batch), rel=1e-6)
    model.epoch += 1
    assert not torch.equal(model.triples(interaction, None).negatives.items, batch.negatives.items)


def test_no_projection_without_weight(toy, monkeypatch):
    model, train = toy(reg_weight=0.0)
    monkeypatch.setattr(model.features, "project", lambda items: pytest.fail("projected"))
    assert model.auxiliary_loss(batch_of(train), batch_of(train).vectors(model.representations())) == 0


# ---- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "message"), [
    ({"knn_k": 0}, "knn_k: 0 is too small"),
    ({"num_layers": 0}, "num_layers: 0 is too small"),
    ({"num_item_layers": 0}, "num_item_layers: 0 is too small"),
    ({"dropout": 1.0}, "dropout: 1.0 is no share"),
    ({"embedding_size": 0}, "embedding_size: 0 is too small"),
    ({"train_neg_ratio": 1}, "train_neg_ratio: FREEDOM draws its own negatives; set num_negatives"),
    ({"modality_weights": {"image": 0}}, "modality_weights: .* positive numbers, write for instance"),
    ({"modality_weights": {"image": "much"}}, "modality_weights: .* positive numbers"),
    ({"negative_sampler": "popular"}, "negative_sampler: 'popular' is not known.*did you mean 'popularity'"),
], ids=str)
def test_values_that_are_refused(toy, keys, message):
    with pytest.raises(ConfigError, match=message):
        toy(**keys)
