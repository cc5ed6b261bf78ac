"""MCDRec: its contract, and its diffusion, graph, vectors and loss against slow loops in numpy."""

import numpy as np
import pytest
import torch
from contract import RankingContract
from recbole.data.interaction import Interaction
from running import slope
from test_freedom import batch_of, bpr_by_hand, edges_of, training_pairs
from test_lattice import with_audio

from recbole_mmdiff.diffusion import fold_in, keyed_normal, keyed_uniform
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model import mcdrec
from recbole_mmdiff.model.mcdrec import Perceptron
from recbole_mmdiff.model.pairwise import bpr_loss

SEED, EPOCH = 99, 2


class TestMCDRec(RankingContract):
    model = "MCDRec"
    keys = {"embedding_size": 16, "unet_channels": 2, "unet_blocks": 1, "num_steps": 4, "hidden_sizes": [8],
            "predicted_items": 40}
    accurate_keys = {"epochs": 40, "learning_rate": 0.02}
    least_ndcg_ratio = 3.5


class TestMCDRecOfAllItems(TestMCDRec):
    """All items in every batch, features as parameters, mirror gradient, and hard negatives."""

    keys = {**TestMCDRec.keys, "predicted_items": 0, "train_features": True, "mirror_interval": 3,
            "negative_sampler": "dns"}


@pytest.fixture(scope="module")
def toy(build_toy):
    """``toy(**keys)``: a model of float64 numbers on the toy domain, and its training part."""

    def build(**keys):
        model, train = build_toy("MCDRec", **{
            "embedding_size": 4, "unet_channels": 2, "unet_blocks": 1, "num_steps": 5, "hidden_sizes": [6, 5],
            "predicted_items": 5, "dropout": 0.3, "dropout_prob": 0.2, "reg_weight": 0.3,
            "denoised_share": 0.4, **keys})
        model.double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        model.denoised.normal_()
        model.seed, model.epoch = SEED, EPOCH
        return model, train

    return build


def numbers(tensor):
    return tensor.detach().double().numpy()


def alpha_bars():
    """alpha-bar of 0 .. 5 steps of betas from 1e-4 to .02, as they are."""
    betas = np.linspace(1e-4, 0.02, 5)
    return np.cumprod([1.0, *(1 - betas)])


# ---- the parts by hand -----------------------------------------------------------------------------


def conditions_by_hand(model):
    """(n_items, m, d): projections, zero where an item lacks the modality."""
    made = []
    for number, layer in enumerate(model.features.projections):
        values = numbers(model.features.table(number)) @ numbers(layer.weight).T + numbers(layer.bias)
        made.append(values * numbers(model.features.present[:, number])[:, None])
    return np.stack(made, 1)


def perceptron_by_hand(model, rows, uniforms):
    """``uniforms`` (n, hidden units) of the dropout of a fifth, None without."""
    start, layers = 0, list(model.perceptron.layers)
    for layer in layers[:-1]:
        rows = np.maximum(rows @ numbers(layer.weight).T + numbers(layer.bias), 0)
        if uniforms is not None:
            rows = np.where(uniforms[:, start:start + rows.shape[1]] < 0.2, 0, rows / 0.8)
        start += rows.shape[1]
    return rows @ numbers(layers[-1].weight).T + numbers(layers[-1].bias)


def adjacency_by_hand(pairs, weights, num_users, num_items):
    matrix = np.zeros((num_users + num_items,) * 2)
    for (user, item), weight in zip(pairs, weights, strict=True):
        matrix[user, num_users + item] = matrix[num_users + item, user] = weight
    degrees = matrix.sum(1)
    for row, column in zip(*matrix.nonzero(), strict=True):
        matrix[row, column] /= np.sqrt(degrees[row] * degrees[column])
    return matrix


def weights_by_hand(model, pairs):
    users, items = numbers(model.user_embedding.weight), numbers(model.denoised)
    return [1 + 0.3 * users[user] @ items[item] / np.linalg.norm(users[user]) / np.linalg.norm(items[item])
            for user, item in pairs]


def representations_by_hand(model, denoised, uniforms, adjacency, num_layers=1):
    embedding, users = numbers(model.item_embedding.weight), numbers(model.user_embedding.weight)
    rows = np.concatenate([0.4 * denoised + 0.6 * embedding,
                           conditions_by_hand(model).reshape(len(embedding), -1)], 1)
    layers = [np.concatenate([users, perceptron_by_hand(model, rows, uniforms)])]
    for _ in range(num_layers):
        layers.append(adjacency @ layers[-1])
    mean = sum(layers) / len(layers)
    return mean[:len(users)], mean[len(users):] + embedding


def seed_of(purpose, batch=0):
    return fold_in(SEED, EPOCH, purpose, batch)


def predicted_by_hand(model, count, batch=0):
    """{item: its prediction} and L_dm, item by item."""
    drawn = keyed_uniform(torch.arange(1, model.n_items), 1, seed_of(mcdrec._ITEMS, batch))[:, 0]
    items = 1 + np.argsort(numbers(drawn), kind="stable")[:count]
    embedding, conditions = numbers(model.item_embedding.weight), conditions_by_hand(model)
    pair_draws = numbers(keyed_uniform(torch.arange(count), 1, seed_of(mcdrec._STEPS, batch), torch.float64))
    made, errors = {}, []
    for place, item in enumerate(items):
        step = 1 + int(pair_draws[place // 2, 0] * 5)
        step = step if place % 2 == 0 else 6 - step
        key = torch.tensor([item])
        noise = numbers(keyed_normal(key, 4, seed_of(mcdrec._NOISE, batch), torch.float64))[0]
        alpha_bar = alpha_bars()[step]
        noised = np.sqrt(alpha_bar) * embedding[item] + np.sqrt(1 - alpha_bar) * noise
        uniforms = keyed_uniform(key, model.network.num_maps, seed_of(mcdrec._MAPS, batch))
        with torch.no_grad():
            prediction = model.network(torch.tensor(noised)[None], float(step),
                                       torch.tensor(conditions[item])[None], uniforms)
        made[int(item)] = numbers(prediction)[0]
        errors.append(((made[int(item)] - embedding[item])**2).mean())
    return made, np.mean(errors)


# ---- the graph of an epoch -------------------------------------------------------------------------


def test_edges_are_weighted_by_user_and_denoised_item(toy):
    model, train = toy(dropout=0.0)
    model.before_epoch(EPOCH)
    pairs = sorted(set(training_pairs(train)))
    weights = weights_by_hand(model, pairs)
    assert max(weights) - min(weights) > 0.2 and all(0.7 <= weight <= 1.3 for weight in weights)
    np.testing.assert_allclose(numbers(model.weights(*torch.tensor(pairs).T)), weights, atol=1e-12)
    expected = adjacency_by_hand(pairs, weights, model.n_users, model.n_items)
    np.testing.assert_allclose(numbers(model.epoch_adjacency.to_dense()), expected, atol=1e-12)
    whole = adjacency_by_hand(pairs, np.ones(len(pairs)), model.n_users, model.n_items)
    np.testing.assert_allclose(numbers(model.adjacency.to_dense()), whole, atol=1e-6)


def test_an_epoch_keeps_a_share_of_the_edges(toy):
    model, train = toy()
    whole = sorted(set(training_pairs(train)))
    drawn = []
    for epoch in (0, 1, 2, 1):
        model.before_epoch(epoch)
        kept = edges_of(model.epoch_adjacency, model.n_users)
        assert set(kept) < set(whole) and len(kept) == int(0.7 * len(whole))
        expected = adjacency_by_hand(kept, weights_by_hand(model, kept), model.n_users, model.n_items)
        np.testing.assert_allclose(numbers(model.epoch_adjacency.to_dense()), expected, atol=1e-6)
        drawn.append(tuple(kept))
    assert len(set(drawn)) == 3 and drawn[1] == drawn[3]


def test_the_first_epoch_takes_the_embeddings(build_toy):
    model, _ = build_toy("MCDRec", embedding_size=4)
    assert torch.equal(model.denoised, model.item_embedding.weight)
    assert model.denoised.data_ptr() != model.item_embedding.weight.data_ptr()


# ---- representations and loss ----------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 3])
def test_representations_in_evaluation(toy, num_layers):
    model, train = toy(num_layers=num_layers)
    model.before_epoch(EPOCH)
    pairs = sorted(set(training_pairs(train)))
    adjacency = adjacency_by_hand(pairs, np.ones(len(pairs)), model.n_users, model.n_items)
    users, items = representations_by_hand(model, numbers(model.denoised), None, adjacency, num_layers)
    found = model.eval().representations()
    np.testing.assert_allclose(numbers(found.users), users, atol=1e-6)
    np.testing.assert_allclose(numbers(found.items), items, atol=1e-6)
    assert len(found.layers) == num_layers + 1
    torch.testing.assert_close(torch.stack(found.layers).mean(0), found.items)


@pytest.mark.parametrize("predicted_items", [5, 0, 1])
def test_representations_and_losses_in_training(toy, predicted_items):
    model, train = toy(predicted_items=predicted_items)
    model.train().before_epoch(EPOCH)
    pairs, count = edges_of(model.epoch_adjacency, model.n_users), predicted_items or model.n_items - 1
    adjacency = adjacency_by_hand(pairs, weights_by_hand(model, pairs), model.n_users, model.n_items)
    chosen = []
    for number in range(2):
        predictions, error = predicted_by_hand(model, count, number)
        chosen.append(tuple(predictions))
        denoised = numbers(model.denoised).copy()
        for item, prediction in predictions.items():
            denoised[item] = prediction
        uniforms = numbers(keyed_uniform(torch.arange(model.n_items), 11, seed_of(mcdrec._UNITS, number)))
        users, items = representations_by_hand(model, denoised, uniforms, adjacency)
        tables = model.representations()
        np.testing.assert_allclose(numbers(tables.users), users, atol=1e-6)
        np.testing.assert_allclose(numbers(tables.items), items, atol=1e-6)
        batch = batch_of(train)
        rows = (users[batch.users.numpy()], items[batch.positives.numpy()],
                items[batch.negatives.items.numpy()])
        assert bpr_loss(*batch.vectors(tables)).item() == pytest.approx(bpr_by_hand(*rows), rel=1e-6)
        lengths = sum((part**2).sum(-1).mean() for part in rows) / 2
        found = model.auxiliary_loss(batch, batch.vectors(tables)).item()
        assert found == pytest.approx(0.5 * error + 0.3 * lengths, rel=1e-6)
    assert chosen[0] != chosen[1], "every batch draws its own"
    assert set(chosen[0]) <= set(range(1, model.n_items)), "never padding"


def test_gradients(toy):
    model, train = toy()
    model.train().before_epoch(EPOCH)
    batch = batch_of(train)

    def loss():
        """In float64, which BPR is not."""
        model.batch = 0
        tables = model.representations()
        scores = (tables.users[batch.users] * tables.items[batch.positives]).sum(1)
        return scores.square().mean() + model.auxiliary_loss(batch, batch.vectors(tables))

    loss().backward()
    for name, parameter in model.named_parameters():
        flat = parameter.grad.view(-1)
        assert flat.isfinite().all() and flat.abs().max() > 1e-9, name
        for place in {0, int(flat.abs().argmax())}:
            index = tuple(int(part) for part in np.unravel_index(place, parameter.shape))
            with torch.no_grad():
                expected = slope(lambda: loss().item(), parameter, index, step=1e-5)
            assert parameter.grad[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-8), name


def test_a_prediction_is_drawn_by_seed_epoch_and_batch_alone(toy):
    model, _ = toy()
    model.train().before_epoch(EPOCH)
    first = [model.representations().items for _ in range(2)]
    torch.rand(3)
    model.before_epoch(EPOCH)
    again = [model.representations().items for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(*first)
    model.before_epoch(EPOCH)
    model.seed += 1
    assert not torch.equal(model.representations().items, first[0])


# ---- the reverse process ---------------------------------------------------------------------------


def test_the_reverse_process_by_hand(toy, monkeypatch):
    model, _ = toy()
    monkeypatch.setattr(mcdrec, "ROWS_AT_ONCE", 5)
    padding = model.denoised[0].clone()
    model.train().after_epoch(EPOCH)
    assert model.training and torch.equal(model.denoised[0], padding)
    bars, seed = alpha_bars(), seed_of_reverse()
    conditions, embedding = conditions_by_hand(model), numbers(model.item_embedding.weight)

    def noise(item, number):
        return numbers(keyed_normal(torch.tensor([item]), 4, fold_in(seed, number), torch.float64))[0]

    for item in range(1, model.n_items):
        state = np.sqrt(bars[5]) * embedding[item] + np.sqrt(1 - bars[5]) * noise(item, -1)
        for number, step in enumerate(range(5, 0, -1)):
            with torch.no_grad():
                x0 = numbers(model.network(torch.tensor(state)[None], float(step),
                                           torch.tensor(conditions[item])[None]))[0]
            beta = 1 - bars[step] / bars[step - 1]
            mean = (np.sqrt(bars[step - 1]) * beta * x0
                    + np.sqrt(1 - beta) * (1 - bars[step - 1]) * state) / (1 - bars[step])
            variance = beta * (1 - bars[step - 1]) / (1 - bars[step])
            state = mean + np.sqrt(max(variance, 0)) * noise(item, number) if step > 1 else mean
        np.testing.assert_allclose(numbers(model.denoised[item]), state, atol=1e-10)


def seed_of_reverse():
    return fold_in(SEED, EPOCH, mcdrec._REVERSE)


def test_what_was_denoised_is_saved(toy):
    model, _ = toy()
    model.after_epoch(EPOCH)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(state["denoised"], model.denoised)
    users = Interaction({"user_id": torch.arange(model.n_users)})
    expected = model.eval().full_sort_predict(users)
    other, _ = toy()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3)
    assert not torch.allclose(other.eval().full_sort_predict(users), expected)
    other.load_state_dict(state)
    torch.testing.assert_close(other.full_sort_predict(users), expected)
    names = {name.split(".")[0] for name in state}
    assert names == {"user_embedding", "item_embedding", "features", "network", "perceptron", "denoised"}


@pytest.mark.parametrize("modalities", [["audio"], ["text", "audio", "image"]])
def test_one_and_three_modalities_and_one_that_half_of_the_items_lack(toy, toy_domain, tmp_path, modalities):
    model, train = toy(data_path=with_audio(toy_domain, tmp_path / "data"), modalities=modalities)
    missing = (~model.features.present[1:, modalities.index("audio")]).nonzero()[:, 0] + 1
    assert 2 * len(missing) == model.n_items - 1
    assert not conditions_by_hand(model)[missing, modalities.index("audio")].any()
    model.train().before_epoch(EPOCH)
    tables = model.representations()
    vectors = batch_of(train).vectors(tables)
    (bpr_loss(*vectors) + model.auxiliary_loss(batch_of(train), vectors)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.after_epoch(EPOCH)
    pairs = sorted(set(training_pairs(train)))
    adjacency = adjacency_by_hand(pairs, np.ones(len(pairs)), model.n_users, model.n_items)
    _, items = representations_by_hand(model, numbers(model.denoised), None, adjacency)
    np.testing.assert_allclose(numbers(model.eval().representations().items), items, atol=1e-6)


def test_perceptron_without_dropout_and_hidden_layers():
    layer = Perceptron([3, 2], 0.5).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(layer(x, torch.zeros(4, 0)), layer.layers[0](x))
    deep = Perceptron([3, 4, 2], 0.0).double()
    assert torch.equal(deep(x, torch.zeros(4, 4)), deep(x, None)), "a share of none"


# ---- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "message"), [
    ({"embedding_size": 8}, "embedding_size, unet_channels.*: dim=8 is no image of 2 levels"),
    ({"unet_channels": 1}, "unet_channels.*channels=1"),
    ({"num_steps": 0}, "num_steps, beta_start, beta_end: num_steps=0"),
    ({"beta_end": 2.0}, "num_steps, beta_start, beta_end: beta_end=2.0"),
    ({"num_layers": 0}, "num_layers: 0 is too small"),
    ({"predicted_items": -1}, "predicted_items: -1 is too small"),
    ({"hidden_sizes": [4, 0]}, "hidden_sizes: 0 is too small"),
    ({"denoising_weight": -1}, "denoising_weight: -1 is too small"),
    ({"reg_weight": -1}, "reg_weight: -1 is too small"),
    ({"denoised_share": 1.5}, "denoised_share: 1.5 is no share"),
    ({"temperature": 2}, "temperature: 2 is no share"),
    ({"dropout": 1.0}, "dropout: 1.0 is no share"),
    ({"dropout_prob": 1.0}, "dropout_prob: 1.0 is no share"),
], ids=str)
def test_values_that_are_refused(toy, keys, message):
    with pytest.raises(ConfigError, match=message):
        toy(**keys)
