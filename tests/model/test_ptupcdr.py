"""PTUPCDR: the contract, the histories against a slow loop, loss and gradient by hand."""

import numpy as np
import pytest
import torch
from contract import ModelContract
from recbole.data.interaction import Interaction
from running import BASES, LEARNING, PRETRAINING, ready_to_transfer, run_keys, slope

from recbole_mmdiff.errors import ConfigError


class TestPTUPCDR(ModelContract):
    """Two factorisations, then the meta network."""

    model = "PTUPCDR"
    keys = PRETRAINING
    accurate_keys = {**LEARNING, "learning_rate": 0.003, "stopping_step": 20}
    best_rmse_ratio = 0.9


@pytest.fixture
def make(tiny_config):
    """``make(**keys)``: a model of random float64 weights, ready for the transfer stage, and the
    training part of its data."""

    def build(**keys):
        keys = {"embedding_size": 2, "meta_size": 3, **keys}
        return ready_to_transfer(tiny_config("PTUPCDR", **keys), std=1.0)

    return build


def slow_histories(train, rows, threshold, length, timed=True):
    """Item ids by user id, out of (user, item, rating, time) tokens."""
    source, found = train.source, {}
    for user, item, rating, time in rows:
        if float(rating) > threshold:
            number = source.field2token_id["user_id"][user]
            entry = (float(time) if timed else 0.0, source.field2token_id["item_id"][item])
            found.setdefault(number, []).append(entry)
    return {user: [item for _, item in sorted(entries)[-length:]] for user, entries in found.items()}


def assert_histories(model, expected):
    users = torch.arange(model.n_users)
    items, present = model.history(users)
    assert items.shape == present.shape == (model.n_users, model.history_length)
    for user in users.tolist():
        history = expected.get(user, [])
        assert items[user].tolist() == history + [0] * (model.history_length - len(history))
        assert present[user].sum() == len(history)


@pytest.mark.parametrize("threshold, length", [(3.0, 20), (3.0, 4), (4.5, 2), (1.0, 1), (5.0, 20)])
def test_histories_against_a_loop(make, tiny_pair, threshold, length):
    model, train = make(history_threshold=threshold, history_length=length)
    expected = slow_histories(train, tiny_pair.source_rows, threshold, length)
    assert_histories(model, expected)
    if threshold == 4.5:
        assert set(model.history_counts[model.overlap_users].tolist()) == {0, 1, 2}


def test_more_than_twenty_with_equal_times_in_any_order(make, make_tiny_pair, atomic, tmp_path):
    pair = make_tiny_pair(tmp_path, per_user=(25, 36))
    rows = [(user, item, rating, str(int(time) % 3)) for user, item, rating, time in pair.source_rows]
    found = []
    for ordered in (rows, sorted(rows), sorted(rows, reverse=True)):
        atomic.write(tmp_path, "src", ordered)
        model, train = make(data_path=tmp_path, history_threshold=2.0)
        expected = slow_histories(train, rows, 2.0, 20)
        assert_histories(model, expected)
        found.append(model.history_items)
    assert {len(history) for history in expected.values()} >= {19, 20}
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_histories_without_times(make, tiny_pair):
    model, train = make(load_col={"inter": ["user_id", "item_id", "rating"]}, history_length=3)
    assert_histories(model, slow_histories(train, tiny_pair.source_rows, 3.0, 3, timed=False))


def batch_of(model):
    """Rating rows of a user with two rows, of two others, and of one whose history is empty."""
    empty = int((model.history_counts[model.overlap_users] == 0).nonzero()[0])
    first, second, empty = model.overlap_users[[0, 1, empty]].tolist()
    return Interaction({"user_id": torch.tensor([first, second, first, empty]),
                        "item_id": torch.tensor([3, 3, 9, 1]),
                        "rating": torch.tensor([4.0, 2.0, 5.0, 1.0], dtype=torch.float64)})


def slow_loss(model, train, weights, batch, histories):
    """The mean squared error, row by row; ``weights`` are the meta network's by name."""
    tables = {name: value.detach().numpy() for name, value in model.state_dict().items()
              if name.startswith(("source.", "target."))}
    biases = model.source.biases

    def users_of(domain):
        parts = [tables[f"{domain}.user_embedding.weight"]]
        table = np.concatenate([*parts, tables[f"{domain}.user_bias.weight"]], 1) if biases else parts[0]
        overlap = table[model.overlap_users.numpy()]
        return table, overlap.mean(0), overlap.std(0, ddof=1)

    item_table = tables["source.item_embedding.weight"]
    if biases:
        item_table = np.concatenate([item_table, tables["source.item_bias.weight"]], 1)
    (source, center, scale), (_, t_center, t_scale) = users_of("source"), users_of("target")
    if model.standardize:
        rated = item_table[sorted(set(train.source.inter_feat["item_id"].tolist()))]
        item_table = (item_table - rated.mean(0)) / rated.std(0)
        source = (source - center) / scale
    errors = []
    for user, item, rating in zip(*(batch[field].tolist() for field in batch), strict=True):
        attended, scores = np.zeros(model.size), []
        for old in histories.get(user, []):
            hidden = np.maximum(weights["attention.0.weight"] @ item_table[old]
                                + weights["attention.0.bias"], 0)
            scores.append(np.exp(weights["attention.2.weight"][0] @ hidden))
        for score, old in zip(scores, histories.get(user, []), strict=True):
            attended = attended + score / sum(scores) * item_table[old]
        hidden = np.maximum(weights["decoder.0.weight"] @ attended + weights["decoder.0.bias"], 0)
        bridge = (weights["decoder.2.weight"] @ hidden + weights["decoder.2.bias"])
        vector = source[user] @ bridge.reshape(model.size, model.size)
        if model.standardize:
            vector = vector * t_scale + t_center
        score = vector[:2] @ tables["target.item_embedding.weight"][item]
        if biases:
            score += vector[2] + tables["target.mean"] + tables["target.item_bias.weight"][item, 0]
        errors.append((score - rating)**2)
    return np.mean(errors)


@pytest.mark.parametrize("base", BASES)
def test_loss_and_gradient_by_hand(make, tiny_pair, base):
    model, train = make(history_threshold=4.0, history_length=3, **base)
    batch, histories = batch_of(model), slow_histories(train, tiny_pair.source_rows, 4.0, 3)
    meta = {name: value for name, value in model.named_parameters()
            if name.startswith(("attention", "decoder"))}
    weights = {name: value.detach().clone().numpy() for name, value in meta.items()}
    loss = model.rating_loss(batch)
    assert loss.item() == pytest.approx(slow_loss(model, train, weights, batch, histories), rel=1e-9)
    loss.backward()
    for name, weight in weights.items():
        for index in list(np.ndindex(*weight.shape))[:12]:
            expected = slope(lambda: slow_loss(model, train, weights, batch, histories), weight, index)
            assert meta[name].grad[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-7), name
    assert {name for name, value in model.named_parameters() if value.grad is not None} == set(meta)


def test_an_empty_history_attends_to_nothing(make):
    """Not to padding: whatever stands in the vector of item 0."""
    model, _ = make(history_threshold=4.0, history_length=3)
    empty = (model.history_counts == 0).nonzero().squeeze(-1)
    assert len(empty) > 1
    assert torch.equal(model.attended(empty), torch.zeros(len(empty), model.size).double())
    bridge = model.decoder(torch.zeros(model.size).double()).view(model.size, model.size)
    torch.testing.assert_close(model.transfer(empty), model.source_vectors(empty) @ bridge)
    model.frozen["items"][0] = torch.nan
    some = torch.tensor([int((model.history_counts == 3).nonzero()[0])])
    assert torch.isfinite(model.transfer(some)).all()


def test_users_with_empty_histories_are_trained_and_scored(tiny_config, tmp_path):
    run = run_keys(tiny_config("PTUPCDR", history_threshold=5.0, **PRETRAINING), tmp_path / "run")
    assert not run.model.history_counts.any()
    assert torch.isfinite(run.model.user_factors(torch.arange(run.model.n_users))).all()


def test_the_base_is_frozen_while_the_meta_network_trains(tiny_config, tmp_path):
    short, long = (run_keys(tiny_config("PTUPCDR", epochs=epochs, eval_step=0, **PRETRAINING),
                            tmp_path / str(epochs)) for epochs in (1, 4))
    for name, value in short.model.state_dict().items():
        moved = not torch.equal(value, long.model.state_dict()[name])
        assert moved == name.startswith(("attention", "decoder")), name


def test_the_decay_is_the_meta_networks_alone(make):
    stages = make(meta_weight_decay=0.5)[0].stages()
    assert [stage.weight_decay for stage in stages] == [0.0, 0.0, 0.5]


@pytest.mark.parametrize("key", ["history_length", "meta_size"])
def test_sizes_below_one_are_refused(make, key):
    with pytest.raises(ConfigError, match=f"{key}: 0 is too small, use 1 or more"):
        make(**{key: 0})
