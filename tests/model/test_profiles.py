"""The profiles of users and the rating head that MMDCDR and MuSiC share, against slow loops."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from recbole_mmdiff.model.factorization import Factorization
from recbole_mmdiff.model.feature_space import Features
from recbole_mmdiff.model.profiles import DomainProfiles, rating_statistics
from recbole_mmdiff.model.rating_head import RatingHead

USERS, ITEMS = 9, 12
IDS_OF = {"vector": (True, False), "mean": (False, True), "both": (True, True)}


@dataclass
class Domain:
    """What these modules ask of a data set."""

    user: list[int]
    item: list[int]
    rating: list[float]
    user_num: int = USERS + 3
    item_num: int = ITEMS
    uid_field: str = "user_id"
    iid_field: str = "item_id"

    def num(self, field):
        return {"user_id": self.user_num, "item_id": self.item_num}[field]

    @property
    def inter_feat(self):
        return {"user_id": torch.tensor(self.user), "item_id": torch.tensor(self.item),
                "rating": torch.tensor(self.rating)}

    @property
    def rows(self):
        return list(zip(self.user, self.item, self.rating, strict=True))


@pytest.fixture
def domain():
    """Rows of users 1 to 11, some rows twice; user 4 and items 10 and 11 have none."""
    draw = np.random.default_rng(2)
    rows = [(user, int(item), float(draw.integers(1, 6))) for user in (1, 2, 3, 5, 6, 7, 8, 9, 10, 11)
            for item in draw.choice(np.arange(1, 10), 4, replace=False)]
    rows += rows[::7]
    return Domain(*map(list, zip(*rows, strict=True)))


def features(dim, unknown, seed, rows=ITEMS):
    """Drawn rows, of which some (and [PAD]) are not known."""
    known = torch.ones(rows, dtype=torch.bool)
    known[[0, *unknown]] = False
    values = torch.tensor(np.random.default_rng(seed).normal(2, 3, (rows, dim))).float()
    return Features(values * known[:, None], known)


@pytest.fixture
def build(domain):
    """``build(id_profile, statistics, own, names)``: profiles with two modalities of items and, unless
    ``id_profile`` is None, ids."""

    def made(id_profile="both", statistics=True, own=None, names=("text", "image")):
        torch.manual_seed(5)
        items = dict(zip(names, (features(3, [2, 5], 1), features(2, range(4, 12), 2)), strict=True))
        told = rating_statistics(domain, "rating", USERS, 4.0, 2.0) if statistics \
            else torch.zeros(USERS, 0)
        base = Factorization(domain, "rating", 3, True, 0.7) if id_profile else None
        if base is not None:
            torch.nn.init.normal_(base.user_bias.weight)
        return DomainProfiles(domain, USERS, items, own or {}, base, id_profile, told)

    return made


def item_rows(profiles, domain, name):
    """item -> its features in a modality, of those who have some."""
    if name != "id":
        place = profiles.content.index(name)
        values, known = (getattr(profiles, f"item_{kind}_{place}") for kind in ("values", "known"))
        return {item: values[item].double().numpy() for item in range(ITEMS) if known[item]}
    vectors = profiles.factorization.item_embedding.weight.detach().double().numpy()
    seen = sorted(set(domain.item))
    size = math.sqrt(np.mean([number**2 for item in seen for number in vectors[item]]))
    return {item: vectors[item] / size for item in seen}


def slow_profile(profiles, domain, name, user):
    """The profile of one user before it is standardised, or None."""
    rows = item_rows(profiles, domain, name)
    rated = {item for who, item, _ in domain.rows if who == user and item in rows}
    if not rated:
        return None
    parts = [np.mean([rows[item] for item in rated], 0)]
    if name == "id":
        vector, mean = IDS_OF[profiles.id_profile]
        parts = [profiles.factorization.user_factors(torch.tensor([user]))[0].detach().double().numpy()] \
            * vector + parts * mean
    return np.concatenate([*parts, profiles.statistics[user].double().numpy()])


# ---- profiles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("id_profile", [None, *IDS_OF])
def test_profiles_by_hand(id_profile, statistics, build, domain):
    """Means over the distinct items of a user, of the items that have features; users beyond the
    given number (of the source domain alone) have none."""
    profiles = build(id_profile, statistics)
    assert list(profiles.profile_sizes) == ["text", "image", *["id"] * bool(id_profile)]
    for name, size in profiles.profile_sizes.items():
        found, has = profiles.profiles(name, torch.arange(USERS))
        assert found.shape == (USERS, size)
        for user in range(USERS):
            expected = slow_profile(profiles, domain, name, user)
            assert has[user] == (expected is not None)
            np.testing.assert_allclose(found[user].detach(), 0 if expected is None else expected,
                                       rtol=1e-5, atol=1e-6)
    assert not profiles.profiles("text", torch.tensor([4]))[1], "no row"
    assert not profiles.profiles("image", torch.arange(USERS))[1].all(), "no item that has an image"


def test_own_features_take_the_place_of_the_means(build):
    own = {"review": features(5, [3, 8], 3, rows=USERS)}
    profiles = build("vector", own=own)
    assert profiles.profile_sizes == {"review": 7, "id": 6} and profiles.item_sizes == \
        {"text": 3, "image": 2, "id": 3}
    found, has = profiles.profiles("review", torch.arange(USERS))
    assert torch.equal(has, own["review"].known)
    expected = torch.cat([own["review"].values, profiles.statistics], 1) * has[:, None]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("users", [[1, 2, 3, 4, 6], [7, 1], [1, 2, 3, 5, 6, 7, 8]])
def test_standardised_by_the_given_users_alone(users, build, domain):
    profiles = build()
    profiles.fit(torch.tensor(users))
    for name in profiles.profile_sizes:
        raw = {user: slow_profile(profiles, domain, name, user) for user in range(USERS)}
        given = np.stack([raw[user] for user in users if raw[user] is not None])
        scale = np.where(given.std(0) < 1e-9, 1, given.std(0))
        found, has = profiles.profiles(name, torch.arange(USERS))
        for user in range(USERS):
            expected = 0 if raw[user] is None else (raw[user] - given.mean(0)) / scale
            np.testing.assert_allclose(found[user], expected, rtol=1e-3, atol=1e-4)
            assert has[user] == (raw[user] is not None)


def test_what_does_not_vary_is_not_blown_up(build, domain):
    """Two users with as many ratings, or a modality that one of them has: only centred."""
    profiles = build("vector")
    profiles.fit(torch.tensor([2, 2]))
    for name in profiles.profile_sizes:
        raw = {user: slow_profile(profiles, domain, name, user) for user in range(USERS)}
        for user, row in enumerate(profiles.profiles(name, torch.arange(USERS))[0]):
            centre = 0 if raw[2] is None else raw[2]
            np.testing.assert_allclose(row, 0 if raw[user] is None else raw[user] - centre, atol=1e-5)


def test_nobody_to_standardise_by(build):
    """A modality that none of them has stays as it is."""
    profiles, plain = build(None), build(None)
    profiles.fit(torch.tensor([4]))
    for name in ("text", "image"):
        for ours, theirs in zip(*(some.profiles(name, torch.arange(USERS)) for some in (profiles, plain)),
                                strict=True):
            assert torch.equal(ours, theirs)


def test_vectors_of_items_have_unit_size_and_only_items_with_rows_have_one(build, domain):
    profiles = build()
    found, known = profiles.items("id")
    assert set(known.nonzero().squeeze(1).tolist()) == set(domain.item)
    assert found[known].square().mean().item() == pytest.approx(1.0, rel=1e-5)
    assert not found[~known].any() and not found.requires_grad
    values, known = profiles.items("text")
    assert known.tolist() == [number not in (0, 2, 5) for number in range(ITEMS)]
    assert not values[~known].any()


@pytest.mark.parametrize(("num_users", "damping"), [(USERS, (4.0, 2.0)), (USERS + 3, (0.0, 0.0)),
                                                    (USERS + 6, (1.0, 30.0))])
def test_rating_statistics_by_hand(num_users, damping, domain):
    found = rating_statistics(domain, "rating", num_users, *damping)
    mean = np.mean(domain.rating)
    bias = {}
    for item in set(domain.item):
        left = [rating - mean for _, other, rating in domain.rows if other == item]
        bias[item] = sum(left) / (len(left) + damping[0])
    assert found.shape == (num_users, 2)
    for user in range(num_users):
        left = [rating - mean - bias[item] for who, item, rating in domain.rows if who == user]
        expected = [math.log(1 + len(left)), sum(left) / (len(left) + damping[1])] if left else [0, 0]
        assert found[user].tolist() == pytest.approx(expected, abs=1e-6)


def test_what_was_computed_from_weights_is_forgotten_with_them(build):
    """Loaded weights, weights moved or cast, and new centres."""
    first, second, users = build(), build(), torch.arange(USERS)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(-2.0).add_(0.3)
    second.fit(users)
    before, expected = (some.profiles("id", users)[0].clone() for some in (first, second))
    first.items("id")
    assert not torch.allclose(before, expected)
    first.load_state_dict(second.state_dict())
    torch.testing.assert_close(first.profiles("id", users)[0], expected)
    torch.testing.assert_close(first.items("id")[0], second.items("id")[0])
    assert not any(name.startswith(("item_values", "rows", "statistics")) for name in first.state_dict())
    first.to("cpu")
    assert not first.tables


def test_a_copy_is_apart(build):
    profiles, users = build(), torch.arange(USERS)
    before = profiles.profiles("id", users)[0].clone()
    other = copy.deepcopy(profiles)
    with torch.no_grad():
        other.factorization.user_embedding.weight.add_(1.0)
    other.fit(users)
    assert not torch.allclose(other.profiles("id", users)[0], before)
    assert torch.equal(profiles.profiles("id", users)[0], before)


@pytest.mark.parametrize("names", [("item", "user"), ("tables", "None")])
def test_any_text_may_name_a_modality(names, build):
    ours, plain, users = build(names=names), build(), torch.arange(USERS)
    ours.items("id")
    for mine, other in (*zip(names, ("text", "image"), strict=True), ("id", "id")):
        assert all(map(torch.equal, ours.profiles(mine, users), plain.profiles(other, users)))
        assert all(map(torch.equal, ours.items(mine), plain.items(other)))


# ---- rating head -------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [True, False])
def test_ratings_by_hand(biases, domain):
    torch.manual_seed(3)
    head = RatingHead(domain, "rating", 4, biases, item_damping=3.0)
    if biases:
        torch.nn.init.normal_(head.item_bias.weight)
    users, items = torch.randn(5, 4), torch.randn(ITEMS, 4)
    found = head.user_factors(users) @ head.item_factors(items).T + head.item_offset(torch.arange(ITEMS))
    mean = np.mean(domain.rating)
    for user in range(5):
        for item in range(ITEMS):
            expected = float(users[user].double() @ items[item].double())
            if biases:
                left = [rating - mean for _, other, rating in domain.rows if other == item]
                expected += mean + sum(left) / (len(left) + 3.0) + head.item_bias.weight[item].item() \
                    + float(head.user_bias.weight.detach()[0].double() @ users[user].double())
            assert found[user, item].item() == pytest.approx(expected, abs=1e-5)
    assert bool(list(head.parameters())) == biases
