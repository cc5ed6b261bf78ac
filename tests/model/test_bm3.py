"""BM3: its contract, and its losses and gradients by slow loops."""

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
    weights_of,
)

from recbole_mmdiff.diffusion import fold_in, keyed_uniform
from recbole_mmdiff.errors import ConfigError


class TestBM3(RankingContract):
    """Without negatives."""

    model = "BM3"
    keys = {"embedding_size": 8}
    accurate_keys = {"epochs": 40, "learning_rate": 0.01}
    least_ndcg_ratio = 3.5


class TestBM3WithTrainedFeatures(TestBM3):
    """Tables of features as parameters, and mirror gradient."""

    keys = {**TestBM3.keys, "train_features": True, "mirror_interval": 3}


@pytest.fixture(scope="module")
def built(build_toy, toy_domain, tmp_path_factory):
    return toy_builder("BM3", build_toy, toy_domain, tmp_path_factory.mktemp("bm3"), num_layers=2,
                       dropout=0.4, cl_weight=1.7, reg_weight=0.3)


def online_by_hand(toy, weights):
    """h_u and h_i of everybody."""
    users, items = lightgcn(dense_adjacency(toy.train), weights["user_embedding.weight"],
                            weights["item_embedding.weight"], toy.model.num_layers)
    return users, items + weights["item_embedding.weight"]


def losses_by_hand(toy, weights, targets):
    """Reconstruction, both modality losses, and penalty; ``targets`` are weights that pass no gradient."""
    model, size = toy.model, toy.model.size
    users, items = online_by_hand(toy, weights)
    shown = [projected_by_hand(model, weights, number) for number in range(len(model.features.names))]
    target_users, target_items = online_by_hand(toy, targets)
    target_shown = [projected_by_hand(model, targets, number) for number in range(len(shown))]

    def predicted(vector):
        return weights["predictor.weight"] @ vector + weights["predictor.bias"]

    def dropped(vector, sample, purpose):
        drawn = keyed_uniform(torch.tensor([sample]), size, fold_in(SEED, EPOCH, purpose))[0]
        return np.array([value / (1 - model.dropout) if one >= model.dropout else 0.0
                         for value, one in zip(vector, drawn.tolist(), strict=True)])

    reconstruction, modal = [], []
    for user, item, sample in rows_of(toy.batch):
        reconstruction.append(2 - cosine(predicted(users[user]), dropped(target_items[item], sample, 1))
                              - cosine(predicted(items[item]), dropped(target_users[user], sample, 0)))
    for number, features in enumerate(shown):
        found = [2 - cosine(predicted(features[item]), dropped(target_items[item], sample, 1))
                 - cosine(predicted(features[item]), dropped(target_shown[number][item], sample, 2 + number))
                 for _, item, sample in rows_of(toy.batch) if model.features.present[item, number]]
        modal.append(np.mean(found))
    lengths = sum(sum((row**2).sum() for row in part)**0.5 for part in (users, items))
    return np.mean(reconstruction) + 1.7 * sum(modal) + 0.3 * lengths / len(items)


@pytest.mark.parametrize("keys", [{"num_layers": 2}, {"num_layers": 0, "dropout": 0.0}])
@pytest.mark.parametrize("modalities", MODALITIES)
def test_loss_and_gradients_by_hand(modalities, keys, built):
    """Nothing flows back through a target."""
    toy = built(modalities=modalities, **keys)
    loss, weights, targets = toy.model.ranking_loss(toy.batch), weights_of(toy.model), weights_of(toy.model)
    assert loss.item() == pytest.approx(losses_by_hand(toy, weights, targets), rel=1e-6)
    loss.backward()
    assert_gradients(toy.model, weights, lambda: losses_by_hand(toy, weights, targets))


def test_scores_by_hand(built):
    toy = built()
    weights = weights_of(toy.model)
    predicted = [part @ weights["predictor.weight"].T + weights["predictor.bias"]
                 for part in online_by_hand(toy, weights)]
    np.testing.assert_allclose(scores_by_model(toy.model, toy.train), scores_by_hand(*predicted, toy.train),
                               atol=1e-6)


def test_at_the_start_scores_are_those_of_the_graph(build_toy):
    """The predictor is the identity."""
    model, train = build_toy("BM3")
    users, items = (part.detach().numpy() for part in model.online()[:2])
    np.testing.assert_allclose(scores_by_model(model, train), scores_by_hand(users, items, train), atol=1e-6)


def test_trained_features(built):
    """Of the batch's items, the rows of those that have the modality learn, as by autograd."""
    toy = built(train_features=True)
    model = toy.model
    model.ranking_loss(toy.batch).backward()
    touched = torch.zeros(model.n_items, dtype=torch.bool)
    touched[toy.batch["item_id"]] = True
    assert not touched[1:].all()
    weights, targets = weights_of(model), weights_of(model)
    for number in range(len(model.features.names)):
        table = model.features.table(number)
        expected = touched & model.features.present[:, number]
        assert torch.equal(table.grad.abs().sum(1) > 0, expected)
        item = int(expected.nonzero()[0])
        with torch.no_grad():
            before = table[item, 0].clone()
            slopes = []
            for sign in (1, -1):
                table[item, 0] = before + sign * 1e-5
                # The targets are those of the table before.
                slopes.append(sign * _with_frozen_targets(toy, weights, targets, number, item, before))
            table[item, 0] = before
        assert table.grad[item, 0].item() == pytest.approx(sum(slopes) / 2e-5, rel=1e-4, abs=1e-7)


def _with_frozen_targets(toy, weights, targets, number, item, before):
    """The loss by hand, with the targets of a feature as it was before."""
    table, real = toy.model.features.table(number), projected_by_hand

    def projected(model, of, which):
        now = table[item, 0].clone()
        if of is targets:
            table[item, 0] = before
        found = real(model, of, which)
        table[item, 0] = now
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "projected_by_hand", projected)
        return losses_by_hand(toy, weights, targets)


def test_without_the_losses_of_modalities(built, monkeypatch):
    toy = built(cl_weight=0.0)
    monkeypatch.setattr(toy.model.features, "project", None)
    toy.model.ranking_loss(toy.batch).backward()
    assert all((value.grad is None) == name.startswith("features")
               for name, value in toy.model.named_parameters())


def test_nobody_in_the_batch_has_the_modality(built):
    toy = built(modalities=["image", "text"])
    bare = (~toy.model.features.present.any(1)).nonzero()[:, 0]
    rows = torch.isin(toy.train.inter_feat["item_id"], bare).nonzero()[:, 0]
    assert len(rows)
    batch = batch_of(toy.train, rows)
    loss = toy.model.ranking_loss(batch)
    loss.backward()
    toy.model.cl_weight = 0.0
    assert loss.item() == toy.model.ranking_loss(batch).item()
    assert all(torch.isfinite(value.grad).all() for value in toy.model.parameters())


def test_dropout_depends_on_seed_epoch_and_sample(built):
    model = built(dropout=0.3).model
    samples, ones = torch.arange(4000), torch.ones(4000, 3, dtype=torch.float64, requires_grad=True)
    found = model._dropped(ones, samples, 0)
    assert not found.requires_grad
    assert set(found.unique().tolist()) == {0.0, 1 / 0.7}
    assert (found == 0).double().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 12000)**0.5)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model._dropped(ones, samples[order], 0), found[order])
    assert not torch.equal(model._dropped(ones, samples, 1), found)
    model.epoch += 1
    assert not torch.equal(model._dropped(ones, samples, 0), found)


@pytest.mark.parametrize(("key", "value"), [
    ("negative_sampler", "uniform"), ("num_negatives", 2), ("train_neg_ratio", 1), ("num_layers", -1),
    ("dropout", 1.0), ("dropout", -0.1), ("embedding_size", 0)])
def test_errors_name_the_key(key, value, built):
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        built(**{key: value})
