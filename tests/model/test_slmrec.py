"""SLMRec: its contract, and its losses, tasks and gradients by slow loops."""

import numpy as np
import pytest
import torch
from contract import RankingContract
from ranking_by_hand import (
    EPOCH,
    MODALITIES,
    SEED,
    assert_gradients,
    batch_of,
    cosine,
    dense_adjacency,
    lightgcn,
    projected_by_hand,
    rows_of,
    scores_by_hand,
    scores_by_model,
    toy_builder,
    training_pairs,
    weights_of,
)

from recbole_mmdiff.diffusion import fold_in, keyed_uniform
from recbole_mmdiff.errors import ConfigError


class TestSLMRec(RankingContract):
    """Fine and coarse spaces."""

    model = "SLMRec"
    keys = {"embedding_size": 8}
    accurate_keys = {"epochs": 30, "learning_rate": 0.01}
    least_ndcg_ratio = 3.5


class TestSLMRecWithFeatureDropout(TestSLMRec):
    keys = {**TestSLMRec.keys, "ssl_task": "FD"}


class TestSLMRecWithFeatureMasking(TestSLMRec):
    keys = {**TestSLMRec.keys, "ssl_task": "FM"}


@pytest.fixture(scope="module")
def built(build_toy, toy_domain, tmp_path_factory):
    return toy_builder("SLMRec", build_toy, toy_domain, tmp_path_factory.mktemp("slmrec"), num_layers=2,
                       temperature=0.5, ssl_temperature=0.7, ssl_weight=1.3, ssl_dropout=0.4)


# ---- by hand ---------------------------------------------------------------------------------------


def starts_by_hand(model, weights):
    return [weights["item_embedding.weight"],
            *(projected_by_hand(model, weights, number) for number in range(len(model.features.names)))]


def graphs_by_hand(toy, weights, starts):
    """(users, items) of each graph."""
    adjacency = dense_adjacency(toy.train)
    return [lightgcn(adjacency, weights["user_embedding.weight"], start, toy.model.num_layers)
            for start in starts]


def linear(weights, name, vector):
    return weights[f"{name}.weight"] @ vector + weights[f"{name}.bias"]


def fused_by_hand(weights, graphs):
    """Users and items, row by row."""
    joined = [np.concatenate(parts, 1) for parts in zip(*graphs, strict=True)]
    return [np.stack([linear(weights, name, row) for row in rows])
            for name, rows in zip(("user_fusion", "item_fusion"), joined, strict=True)]


def main_loss_by_hand(toy, weights):
    users, items = fused_by_hand(weights, graphs_by_hand(toy, weights, starts_by_hand(toy.model, weights)))
    known, terms = training_pairs(toy.train), []
    for user, item, _ in rows_of(toy.batch):
        own = np.exp(cosine(users[user], items[item]) / 0.5)
        others = [np.exp(cosine(users[user], items[other]) / 0.5) for _, other, _ in rows_of(toy.batch)
                  if (user, other) not in known]
        terms.append(-np.log(own / (own + sum(others))))
    return np.mean(terms)


def contrast_by_hand(first, second):
    """InfoNCE from each row of ``first`` to that of ``second``."""
    terms = []
    for row, vector in enumerate(first):
        similar = np.array([np.exp(cosine(vector, other) / 0.7) for other in second])
        terms.append(-np.log(similar[row] / similar.sum()))
    return np.mean(terms)


def fine_and_coarse_by_hand(toy, weights):
    graphs = graphs_by_hand(toy, weights, starts_by_hand(toy.model, weights))
    items = sorted({item for _, item, _ in rows_of(toy.batch)})
    mapped, loss = {item: graphs[0][1][item] for item in items}, 0.0
    for number in range(len(toy.model.features.names)):
        mapped = {item: linear(weights, f"first_maps.{number}", mapped[item]) for item in items}
        have = [item for item in items if toy.model.features.present[item, number]]
        loss += contrast_by_hand([mapped[item] for item in have],
                                 [linear(weights, f"second_maps.{number}", graphs[number + 1][1][item])
                                  for item in have])
    return loss


def views_by_hand(toy, weights, views):
    fused = [fused_by_hand(weights, graphs_by_hand(toy, weights, starts)) for starts in views]
    loss = 0.0
    for place in (0, 1):
        ids = sorted({row[place] for row in rows_of(toy.batch)})
        loss += contrast_by_hand(*(view[place][ids] for view in fused))
    return loss


def batch_seed(toy):
    return fold_in(SEED, EPOCH, rows_of(toy.batch)[0][2])


def feature_dropout_by_hand(toy, weights):
    starts = starts_by_hand(toy.model, weights)
    size, count = toy.model.size, len(starts)
    drawn = keyed_uniform(torch.arange(toy.train.item_num), 2 * count * size, batch_seed(toy)).numpy()
    views = [[start * (drawn[:, (view * count + graph) * size:][:, :size] >= 0.4) / 0.6
              for graph, start in enumerate(starts)] for view in (0, 1)]
    return views_by_hand(toy, weights, views)


def feature_masking_by_hand(toy, weights):
    starts = starts_by_hand(toy.model, weights)
    drawn = keyed_uniform(torch.tensor([rows_of(toy.batch)[0][2]]), len(starts), batch_seed(toy))[0]
    masked = sorted(range(len(starts)), key=lambda graph: drawn[graph])[:2]
    return views_by_hand(toy, weights, [[np.zeros_like(start) if graph == without else start
                                         for graph, start in enumerate(starts)] for without in masked])


BY_HAND = {"FAC": fine_and_coarse_by_hand, "FD": feature_dropout_by_hand, "FM": feature_masking_by_hand}


# ---- the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", BY_HAND)
@pytest.mark.parametrize("modalities", MODALITIES)
def test_loss_and_gradients_by_hand(modalities, task, built):
    toy = built(modalities=modalities, ssl_task=task)

    def by_hand():
        return main_loss_by_hand(toy, weights) + 1.3 * BY_HAND[task](toy, weights)

    loss, weights = toy.model.ranking_loss(toy.batch), weights_of(toy.model)
    assert loss.item() == pytest.approx(by_hand(), rel=1e-6)
    loss.backward()
    assert_gradients(toy.model, weights, by_hand)


def test_no_task(built):
    toy = built(ssl_weight=0.0)
    loss, weights = toy.model.ranking_loss(toy.batch), weights_of(toy.model)
    assert loss.item() == pytest.approx(main_loss_by_hand(toy, weights), rel=1e-6)
    loss.backward()
    maps = [name for name in weights if "_maps" in name]
    assert_gradients(toy.model, weights, lambda: main_loss_by_hand(toy, weights), untouched=maps)


@pytest.mark.parametrize("modalities", MODALITIES)
def test_scores_by_hand(modalities, built):
    toy = built(modalities=modalities)
    weights = weights_of(toy.model)
    fused = fused_by_hand(weights, graphs_by_hand(toy, weights, starts_by_hand(toy.model, weights)))
    np.testing.assert_allclose(scores_by_model(toy.model, toy.train), scores_by_hand(*fused, toy.train),
                               atol=1e-6)


def test_features_have_length_one(built):
    features = built().model.features
    for number in range(3):
        lengths = features.table(number).norm(dim=1)
        torch.testing.assert_close(lengths[lengths > 0], torch.ones_like(lengths[lengths > 0]))
        assert not lengths[~features.present[:, number]].any()


def test_a_user_who_knows_the_whole_batch(built):
    """There is nothing to tell apart: no loss, and no gradient that is none."""
    toy = built(ssl_weight=0.0)
    user = toy.train.inter_feat["user_id"].mode().values
    rows = (toy.train.inter_feat["user_id"] == user).nonzero()[:, 0]
    assert len(rows) > 1
    loss = toy.model.ranking_loss(batch_of(toy.train, rows))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert all(value.grad is None or torch.isfinite(value.grad).all() for value in toy.model.parameters())


def test_known_items_of_a_batch(built):
    toy = built()
    users = torch.arange(toy.train.user_num)
    for items in (torch.tensor([2, 5, 7]), torch.arange(1, toy.train.item_num)):
        expected = [[pair in training_pairs(toy.train) for pair in ((user, item) for item in items.tolist())]
                    for user in users.tolist()]
        assert toy.model.known.among(users, items).tolist() == expected


def test_masking_draws_two_graphs(built):
    """Each ordered pair of graphs is as likely."""
    model = built(ssl_task="FM").model
    starts = [torch.ones(2, 1) for _ in range(4)]
    counts = dict.fromkeys(((one, other) for one in range(4) for other in range(4) if one != other), 0)
    for sample in range(1200):
        views = torch.cat(model._starts_of_fm(starts, torch.tensor([sample, 0])), 1)[0].view(2, 4)
        assert views.sum(1).tolist() == [3, 3]
        counts[tuple(views.argmin(1).tolist())] += 1
    chi_square = sum((found - 100)**2 / 100 for found in counts.values())
    assert chi_square < 31.26       # the .999 quantile for 11 degrees of freedom


@pytest.mark.parametrize("task", ["FD", "FM"])
def test_views_depend_on_seed_epoch_and_batch(task, built):
    toy = built(ssl_task=task)
    found = [toy.model.ranking_loss(toy.batch).item() for _ in range(2)]
    assert found[0] == found[1]
    others = set()
    for epoch in range(12):
        toy.model.epoch = epoch
        others.add(toy.model.ranking_loss(toy.batch).item())
    assert len(others) > 3


@pytest.mark.parametrize(("key", "value"), [
    ("negative_sampler", "dns"), ("num_negatives", 3), ("num_layers", -1), ("temperature", 0.0),
    ("ssl_temperature", -0.1), ("ssl_dropout", 1.0), ("ssl_task", "FAD")])
def test_errors_name_the_key(key, value, built):
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        built(**{key: value})
