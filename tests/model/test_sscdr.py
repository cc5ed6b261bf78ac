"""SSCDR: the contract, its two losses by hand, its draws, and its hops against a slow loop."""

import numpy as np
import pytest
import torch
from contract import ModelContract
from recbole.data.interaction import Interaction
from running import BASES, LEARNING, PRETRAINING, ready_to_transfer, run_keys, slope

from recbole_mmdiff.errors import ConfigError, DataError
from recbole_mmdiff.negatives import KnownItems


class TestSSCDR(ModelContract):
    """Two factorisations and a map that also sees source items."""

    model = "SSCDR"
    keys = PRETRAINING
    accurate_keys = LEARNING
    best_rmse_ratio = 0.95


@pytest.fixture
def make(tiny_config):
    """``make(**keys)``: a model of random float64 weights, ready for the transfer stage, and the
    training part of its data."""

    def build(**keys):
        return ready_to_transfer(tiny_config("SSCDR", embedding_size=3, **keys), std=0.6)

    return build


def source_pairs(train, lowest):
    """(user, item) of source rows rated from ``lowest`` up."""
    rows = train.source.inter_feat
    return [(user, item) for user, item, rating in
            zip(*(rows[field].tolist() for field in ("user_id", "item_id", "rating")), strict=True)
            if rating >= lowest]


def table_of(model, domain):
    """Standardised vectors of all users of a domain, from the tables alone; and their scale."""
    base = getattr(model, domain)
    tables = [base.user_embedding.weight] + ([base.user_bias.weight] if base.biases else [])
    table = np.concatenate([weight.detach().numpy() for weight in tables], 1)
    if not model.standardize:
        return table, np.ones(model.size)
    overlap = table[model.overlap_users.numpy()]
    scale = overlap.std(0, ddof=1)
    return (table - overlap.mean(0)) / scale, scale


def slow_points(model, train):
    """v_j of every source item, by loops."""
    users, scale = table_of(model, "source")
    factors = model.source.item_embedding.weight.detach().numpy()
    pairs, points = source_pairs(train, 4), []
    for number, factor in enumerate(factors):
        if model.item_points == "likers":
            likers = [users[user] for user, item in pairs if item == number]
            points.append(np.mean(likers, 0) if likers else np.zeros(model.size))
        else:
            points.append(np.append(factor, [1.0] * model.source.biases) * scale)
    return np.array(points)


def clip(vector):
    return vector / max(1.0, np.sqrt(sum(value**2 for value in vector)))


def slow_loss(model, train, weight, users, triplets):
    """Supervised and unsupervised loss by loops; ``triplets`` are (user, liked, unknown)."""
    source, target = table_of(model, "source")[0], table_of(model, "target")[0]
    points = slow_points(model, train)
    supervised = np.mean([(weight @ source[user] - target[user])**2 for user in users])
    hinges = []
    for user, liked, unknown in triplets:
        near, far = (sum((clip(target[user]) - clip(weight @ points[item]))**2)
                     for item in (liked, unknown))
        hinges.append(max(0.0, model.margin + near - far))
    return supervised + model.triplet_weight * np.mean(hinges)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("item_points", ["likers", "factors"])
def test_loss_and_gradient_by_hand(make, base, item_points):
    model, train = make(item_points=item_points, triplet_weight=0.7, margin=0.3, **base)
    users, sample_id = model.overlap_users[:6], torch.arange(40, 46)
    place, liked, unknown = model.sample_items(users, sample_id)
    triplets = list(zip(users[place].tolist(), liked.tolist(), unknown.tolist(), strict=True))
    layer = model.mapping[0].weight
    weight = layer.detach().clone().numpy()
    loss = model.mapping_loss(Interaction({"user_id": users, "sample_id": sample_id}))
    expected = slow_loss(model, train, weight, users.tolist(), triplets)
    assert loss.item() == pytest.approx(expected, rel=1e-7)
    loss.backward()
    for index in np.ndindex(*weight.shape):
        expected = slope(lambda: slow_loss(model, train, weight, users.tolist(), triplets), weight, index)
        assert layer.grad[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert [name for name, value in model.named_parameters() if value.grad is not None] \
        == ["mapping.0.weight"]


def test_factors_keep_the_order_of_scores(make):
    """A standardised user times an item is the raw product, up to a constant of the item."""
    model, _ = make(item_points="factors", biases=True, standardize=True)
    users, items = torch.arange(1, 9), torch.arange(1, 7)
    raw = model.source.user_factors(users) @ model.source.item_factors(items).T
    ours = model.source_vectors(users) @ model.source_item_vectors()[items].T
    difference = (raw - ours).detach()
    torch.testing.assert_close(difference, difference[:1].expand_as(difference))


def test_draws_are_liked_and_unknown_and_by_the_sample(make):
    model, train = make()
    likes, knows = set(source_pairs(train, 4)), set(source_pairs(train, 0))
    users = model.overlap_users.repeat(60)
    samples = torch.arange(len(users))
    place, liked, unknown = model.sample_items(users, samples)
    pairs = list(zip(users[place].tolist(), liked.tolist(), unknown.tolist(), strict=True))
    assert set(users[place].tolist()) == {user for user, _ in likes} & set(users.tolist())
    assert all((user, item) in likes for user, item, _ in pairs)
    assert not any((user, item) in knows for user, _, item in pairs)
    assert {item for _, _, item in pairs} == set(range(1, train.source.item_num))
    chosen = [11, 3]
    again = model.sample_items(users[place[chosen]], samples[place[chosen]])
    assert torch.equal(again[1], liked[chosen])
    assert torch.equal(again[2], unknown[chosen])
    model.epoch = 3
    assert not torch.equal(model.sample_items(users, samples)[2], unknown)


def test_users_without_a_triplet_are_left_out(make):
    model, _ = make()
    users, items = model.overlap_users[:3], model.liked.num_items
    everything = torch.arange(1, items)
    # The first likes nothing; the second knows every item; the third has a triplet.
    size = len(model.liked.counts)
    model.liked = KnownItems(users[1:], torch.tensor([2, 5]), size, items)
    model.known = KnownItems(torch.cat([users[1].expand(items - 1), users[2:]]),
                             torch.cat([everything, torch.tensor([5])]), size, items)
    place, liked, _ = model.sample_items(users, torch.arange(3))
    assert place.tolist() == [2]
    assert liked.tolist() == [5]
    samples = torch.arange(2)
    assert model.triplet_loss(users[:2], samples).item() == 0
    model.mapping_loss(Interaction({"user_id": users[:2], "sample_id": samples})).backward()
    assert torch.isfinite(model.mapping[0].weight.grad).all()


@pytest.mark.parametrize("item_points", ["likers", "factors"])
@pytest.mark.parametrize("hops", [0, 1, 2])
def test_hops_against_a_loop(make, hops, item_points):
    model, train = make(hops=hops, item_points=item_points, mapping_hidden_sizes=[5])
    first, second = (model.mapping[number].weight.detach().numpy() for number in (0, 2))
    users, items = (np.array([second @ np.tanh(first @ vector) for vector in table])
                    for table in (table_of(model, "source")[0], slow_points(model, train)))
    pairs = source_pairs(train, 4)
    for _ in range(hops):
        next_users, next_items = users.copy(), items.copy()
        for number in {user for user, _ in pairs}:
            mean = np.mean([items[item] for user, item in pairs if user == number], 0)
            next_users[number] = (users[number] + mean) / 2
        for number in {item for _, item in pairs}:
            mean = np.mean([users[user] for user, item in pairs if item == number], 0)
            next_items[number] = (items[number] + mean) / 2
        lonely_users = set(range(len(users))) - {user for user, _ in pairs}
        lonely_items = set(range(len(items))) - {item for _, item in pairs}
        next_users[list(lonely_users)] = users[list(lonely_users)]
        next_items[list(lonely_items)] = items[list(lonely_items)]
        users, items = next_users, next_items
    wanted = torch.arange(model.n_users)
    for mode in (True, False):
        found = model.train(mode).transfer(wanted).detach()
        np.testing.assert_allclose(found, users[:model.n_users], rtol=1e-6, atol=1e-7)


def test_what_was_inferred_follows_the_mapping(make):
    model, _ = make(hops=1)
    users = torch.tensor([1, 2])
    before = model.eval().transfer(users).clone()
    with torch.no_grad():
        model.mapping[0].weight.mul_(2)
    torch.testing.assert_close(model.train().transfer(users), 2 * before)
    torch.testing.assert_close(model.eval().transfer(users), 2 * before)


def test_without_triplets_it_is_emcdr(tiny_config, tmp_path):
    ours, emcdr = (run_keys(tiny_config(name, **keys, **PRETRAINING), tmp_path / name)
                   for name, keys in (("SSCDR", {"triplet_weight": 0.0}), ("EMCDR", {})))
    assert torch.equal(ours.model.mapping[0].weight, emcdr.model.mapping[0].weight)
    assert ours.metrics["test"] == emcdr.metrics["test"]


def test_the_base_is_frozen_while_mapping(tiny_config, tmp_path):
    short, long = (run_keys(tiny_config("SSCDR", epochs=epochs, eval_step=0, hops=1, **PRETRAINING),
                            tmp_path / str(epochs)) for epochs in (1, 4))
    for name, value in short.model.state_dict().items():
        moved = not torch.equal(value, long.model.state_dict()[name])
        assert moved == name.startswith("mapping"), name


@pytest.mark.parametrize("keys, message", [
    ({"hops": -1}, "hops: -1 is negative"), ({"margin": -0.5}, "margin: -0.5 is negative"),
    ({"triplet_weight": -1.0}, "triplet_weight: -1.0 is negative"),
    ({"item_points": "liker"}, "did you mean 'likers'")])
def test_keys_that_cannot_be_used(make, keys, message):
    with pytest.raises(ConfigError, match=message):
        make(**keys)


def test_no_liked_item_is_refused(make):
    with pytest.raises(DataError, match=r"positive_rating: no rating of src reaches 9.0"):
        make(positive_rating=9.0)
