"""LATTICE: its contract, and its graph, vectors and loss against dense matrices in float64."""

import shutil

import numpy as np
import pytest
import torch
from contract import RankingContract
from recbole.data.interaction import Interaction
from running import slope
from test_freedom import batch_of, bpr_by_hand, training_pairs

from recbole_mmdiff.data.features import write_features
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.lattice import LATTICE
from recbole_mmdiff.model.pairwise import bpr_loss


class TestLATTICE(RankingContract):
    model = "LATTICE"
    keys = {"embedding_size": 8, "knn_k": 5}
    accurate_keys = {"epochs": 40, "learning_rate": 0.02, "embedding_size": 16}
    least_ndcg_ratio = 3.5


class TestLATTICEWithTrainedFeatures(TestLATTICE):
    """Tables of features as parameters, mirror gradient, and vectors mixed from layers."""

    keys = {**TestLATTICE.keys, "train_features": True, "mirror_interval": 3, "negative_sampler": "mixgcf"}


@pytest.fixture(scope="module")
def toy(build_toy):
    """``toy(**keys)``: a model of float64 numbers on the toy domain, and its training part."""

    def build(**keys):
        model, train = build_toy("LATTICE", **{"knn_k": 3, "reg_weight": 0.3, "original_share": 0.6, **keys})
        model.double()
        logits = model.latent_graph.modality_logits
        logits.data = torch.linspace(0.5, -0.7, len(logits)).double()
        model.seed, model.epoch = 99, 2
        return model, train

    return build


# ---- by hand: dense matrices -----------------------------------------------------------------------


def neighbours_by_hand(values, members, knn_k):
    """item -> [(other, cosine)], the most similar ``knn_k`` members."""
    found = {}
    for item in members:
        cosines = {other: values[item] @ values[other]
                   / np.sqrt((values[item] @ values[item]) * (values[other] @ values[other]))
                   for other in members}
        order = sorted(cosines, key=lambda other: (other != item, -round(cosines[other], 6), other))[:knn_k]
        found[item] = [(other, cosines[other]) for other in order]
    return found


def normalised_by_hand(found, count):
    graph = np.zeros((count, count))
    for item, others in found.items():
        for other, cosine in others:
            graph[item, other] = cosine
    degrees = graph.sum(1)
    scale = np.array([degree**-0.5 if degree > 0 else 0.0 for degree in degrees])
    return scale[:, None] * graph * scale


def graph_by_hand(model, arrays, knn_k=3, original_share=0.6):
    """A out of the arrays of the weights."""
    count, names = model.n_items, model.features.names
    exp = np.exp(arrays["latent_graph.modality_logits"])
    weights = exp / exp.sum()
    parts, holds = [], []
    for number in range(len(names)):
        values = model.features.table(number).detach().double().numpy()
        members = [item for item in range(count) if model.features.present[item, number]]
        raw = [item for item in members if np.any(values[item])]
        projected = values @ arrays[f"features.projections.{number}.weight"].T \
            + arrays[f"features.projections.{number}.bias"]
        pair = [normalised_by_hand(neighbours_by_hand(values, raw, knn_k), count),
                normalised_by_hand(neighbours_by_hand(projected, members, knn_k), count)]
        parts += pair
        holds += [np.isin(np.arange(count), raw), np.isin(np.arange(count), members)]
    shares = np.array([weight * share for weight in weights
                       for share in (original_share, 1 - original_share)])
    total = sum(share * held for share, held in zip(shares, holds, strict=True))
    graph = np.zeros((count, count))
    for share, part in zip(shares, parts, strict=True):
        graph += share * part / np.where(total > 0, total, 1)[:, None]
    return graph


def adjacency_by_hand(pairs, num_users, num_items):
    """D^-1 (A + I)."""
    matrix = np.eye(num_users + num_items)
    for user, item in pairs:
        matrix[user, num_users + item] = matrix[num_users + item, user] = 1
    return matrix / matrix.sum(1, keepdims=True)


def arrays_of(model):
    return {name: value.detach().numpy().copy() for name, value in model.named_parameters()}


def vectors_by_hand(model, train, arrays, graph, num_layers=2, num_item_layers=1):
    items = higher = arrays["item_embedding.weight"]
    for _ in range(num_item_layers):
        higher = graph @ higher
    lengths = np.sqrt((higher**2).sum(1, keepdims=True))
    adjacency = adjacency_by_hand(training_pairs(train), model.n_users, model.n_items)
    layers = [np.concatenate([arrays["user_embedding.weight"], items])]
    for _ in range(num_layers):
        layers.append(adjacency @ layers[-1])
    mean = sum(layers) / len(layers)
    return mean[:model.n_users], mean[model.n_users:] + higher / np.maximum(lengths, 1e-12)


def loss_by_hand(model, train, arrays, batch, graph):
    users, items = vectors_by_hand(model, train, arrays, graph)
    chosen = (users[batch.users.numpy()], items[batch.positives.numpy()],
              items[batch.negatives.items.numpy()])
    lengths = sum((part**2).sum(-1).mean() for part in chosen) / 2
    return bpr_by_hand(*chosen) + model.reg_weight * lengths


# ---- the graph -------------------------------------------------------------------------------------


def dense(edges, count):
    matrix = torch.zeros(count, count, dtype=edges.values.dtype)
    return matrix.index_put((edges.rows, edges.columns), edges.values).detach().numpy()


@pytest.mark.parametrize("policy", ["drop_item", "mean"])
@pytest.mark.parametrize("knn_k", [1, 3, 50])
def test_graph(toy, knn_k, policy):
    """With an item without any modality, with one, and with a text of zeros, whose projection is none."""
    model, train = toy(knn_k=knn_k, modality_policy=policy)
    ours = dense(model.latent_graph(model.features), model.n_items)
    np.testing.assert_allclose(ours, graph_by_hand(model, arrays_of(model), knn_k), atol=1e-6)
    without, text_only = train.token2id("item_id", ["i0", "i1"])
    if policy == "drop_item":
        assert not ours[[0, without]].any() and not ours[:, [0, without]].any()
        image = model.features.names.index("image")
        assert not model.features.present[text_only, image] and ours[text_only].any()
    if knn_k == 3:
        assert (ours != 0).sum(1).max() <= 4 * 3


@pytest.mark.parametrize("modalities", [["text"], ["image"]])
def test_graph_of_one_modality(toy, modalities):
    model, _ = toy(modalities=modalities)
    ours = dense(model.latent_graph(model.features), model.n_items)
    np.testing.assert_allclose(ours, graph_by_hand(model, arrays_of(model)), atol=1e-6)


@pytest.mark.parametrize("original_share", [0.0, 1.0])
def test_the_ends_of_the_share(toy, original_share):
    """1 leaves the graph of the raw features, whatever is projected; 0 the learned one."""
    model, _ = toy(original_share=original_share)
    before = dense(model.latent_graph(model.features), model.n_items)
    np.testing.assert_allclose(before, graph_by_hand(model, arrays_of(model), 3, original_share), atol=1e-6)
    with torch.no_grad():
        for layer in model.features.projections:
            layer.weight.mul_(torch.randn_like(layer.weight))
    after = dense(model.latent_graph(model.features), model.n_items)
    assert np.array_equal(before, after) == (original_share == 1)


# ---- representations and loss ----------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("num_layers", "num_item_layers"), [(1, 1), (2, 1), (3, 2)])
def test_representations(toy, num_layers, num_item_layers, training):
    model, train = toy(num_layers=num_layers, num_item_layers=num_item_layers)
    arrays = arrays_of(model)
    users, items = vectors_by_hand(model, train, arrays, graph_by_hand(model, arrays), num_layers,
                                   num_item_layers)
    model.train(training)
    for found in (model.representations(), model.representations()):
        np.testing.assert_allclose(found.users.detach().numpy(), users, atol=1e-6)
        np.testing.assert_allclose(found.items.detach().numpy(), items, atol=1e-6)
        assert len(found.layers) == num_layers + 1
        torch.testing.assert_close(torch.stack(found.layers).mean(0), found.items)


def test_loss_and_gradients_of_the_first_batch_and_of_others(toy):
    model, train = toy()
    batch = batch_of(train)
    model.train().before_epoch(2)
    arrays = arrays_of(model)
    graph = graph_by_hand(model, arrays)
    for first in (True, False):
        model.zero_grad()
        tables = model.representations()
        loss = bpr_loss(*batch.vectors(tables)) + model.auxiliary_loss(batch, batch.vectors(tables))
        loss.backward()

        def by_hand(first=first):
            made = graph_by_hand(model, arrays) if first else graph
            return loss_by_hand(model, train, arrays, batch, made)

        assert loss.item() == pytest.approx(by_hand(), rel=1e-6)
        for name, parameter in model.named_parameters():
            if not first and not name.endswith("embedding.weight"):
                assert parameter.grad is None, f"{name}: the graph is a constant"
                continue
            for index in np.ndindex(*parameter.shape):
                assert parameter.grad[index].item() == pytest.approx(
                    slope(by_hand, arrays[name], index), rel=1e-3, abs=2e-6), (name, index)


def test_without_regularisation_the_loss_is_bpr(toy):
    model, train = toy(reg_weight=0)
    assert model.auxiliary_loss(batch_of(train), batch_of(train).vectors(model.representations())) == 0


# ---- when the graph is built -----------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch):
    """A list that grows with each graph that is built."""
    made, build = [], LATTICE._keep
    monkeypatch.setattr(LATTICE, "_keep", lambda model, edges: made.append(edges) or build(model, edges))
    return made


def shift_projections(model):
    with torch.no_grad():
        for layer in model.features.projections:
            layer.weight.add_(torch.linspace(-2, 1, layer.weight.numel()).view_as(layer.weight))


def test_one_graph_an_epoch_and_one_for_an_evaluation(toy, builds):
    model, train = toy()
    rows = Interaction({"user_id": train.inter_feat["user_id"], "item_id": train.inter_feat["item_id"],
                        "sample_id": torch.arange(len(train.inter_feat))})
    for epoch in range(2):
        model.train()
        model.before_epoch(epoch)
        for _ in range(3):
            model.ranking_loss(rows).backward()
            shift_projections(model)
        assert len(builds) == 2 * epoch + 1, "in the first batch alone"
        assert builds[-1].values.requires_grad
        model.eval()
        for _ in range(2):
            model.full_sort_predict(rows)
        assert len(builds) == 2 * epoch + 2
        assert not builds[-1].values.requires_grad
        expected = graph_by_hand(model, arrays_of(model))
        np.testing.assert_allclose(dense(builds[-1], model.n_items), expected, atol=1e-6)
        assert not np.allclose(dense(builds[-2], model.n_items), expected, atol=1e-3), "weights have changed"


def test_a_graph_that_needs_no_gradient_is_not_the_first_batchs(toy, builds):
    """An inference before the first batch, as CCDRec's after a resume, does not take its gradient away."""
    model, _ = toy()
    model.train().before_epoch(0)
    with torch.no_grad():
        model.eval()
        model.representations()
        model.train()
    model.representations().items.sum().backward()
    assert [made.values.requires_grad for made in builds] == [False, True]
    assert model.features.projections[0].weight.grad.abs().max() > 0


def test_loaded_weights_are_another_graph(toy):
    model, _ = toy()
    model.eval()
    before = model.higher_items()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    shift_projections(model)
    assert torch.equal(model.higher_items(), before), "kept"
    model.load_state_dict(state)
    assert torch.equal(model.higher_items(), before)
    shift_projections(model)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert not torch.allclose(model.higher_items(), before, atol=1e-4)
    assert model.float().higher_items().dtype == torch.float32


def test_the_graph_is_the_same_under_autocast(toy):
    model = toy()[0].float()
    expected = model.latent_graph(model.features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.latent_graph(model.features)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_the_state_holds_weights_only(toy):
    assert set(toy()[0].state_dict()) == {
        "user_embedding.weight", "item_embedding.weight", "latent_graph.modality_logits",
        *(f"features.projections.{number}.{part}" for number in (0, 1) for part in ("weight", "bias"))}


def with_audio(toy_domain, folder):
    """A copy of the toy domain with a third modality, of which every second item has nothing."""
    shutil.copytree(toy_domain, folder)
    tokens = [f"i{number}" for number in range(0, 12, 2)]
    matrix = np.random.default_rng(8).normal(size=(len(tokens), 5)).astype(np.float32)
    write_features(folder / "tgt", "tgt", "audio", tokens, matrix, encoder="test")
    return folder


@pytest.mark.parametrize("modalities", [["audio"], ["text", "audio", "image"]])
def test_one_and_three_modalities_and_one_that_half_of_the_items_lack(toy, toy_domain, tmp_path, modalities):
    model, train = toy(data_path=with_audio(toy_domain, tmp_path / "data"), modalities=modalities)
    assert 2 * model.features.present[:, modalities.index("audio")].sum() == model.n_items - 1
    arrays = arrays_of(model)
    users, items = vectors_by_hand(model, train, arrays, graph_by_hand(model, arrays))
    found = model.train().representations()
    np.testing.assert_allclose(found.users.detach().numpy(), users, atol=1e-6)
    np.testing.assert_allclose(found.items.detach().numpy(), items, atol=1e-6)
    found.items.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("keys", "message"), [
    ({"knn_k": 0}, "knn_k: 0 is too small"),
    ({"num_layers": 0}, "num_layers: 0 is too small"),
    ({"num_item_layers": 0}, "num_item_layers: 0 is too small"),
    ({"original_share": 1.5}, "original_share: 1.5 is no share"),
    ({"reg_weight": -1}, "reg_weight: -1 is too small"),
], ids=str)
def test_values_that_are_refused(toy, keys, message):
    with pytest.raises(ConfigError, match=message):
        toy(**keys)
