"""PopularityNegatives against numpy's cumulative shares, one user after the other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from recbole_mmdiff.diffusion import keyed_uniform
from recbole_mmdiff.negatives import KnownItems, PopularityNegatives

USERS, ITEMS = 5, 9
COUNTS = torch.tensor([100, 3, 0, 7, 1, 12, 2, 0, 5])
KNOWN = {0: [], 1: [5], 2: [1, 3, 4, 8], 3: [2, 7], 4: [1, 3, 4, 5, 6, 8]}


def known_items(sets, num_users=USERS, num_items=ITEMS):
    pairs = [(user, item) for user, items in sets.items() for item in items]
    users, items = (torch.tensor([pair[side] for pair in pairs], dtype=torch.int64)
                    for side in (0, 1))
    return KnownItems(users, items, num_users, num_items)


def shares(known, counts, exponent):
    """The law of one user (num_items,): the uniform one where no unknown item has a count."""
    law = np.array([0.0 if item == 0 or item in known or not count else float(count) ** exponent
                    for item, count in enumerate(counts)])
    if law.any():
        return law / law.sum()
    law[[item for item in range(1, len(counts)) if item not in known]] = 1
    return law / law.sum()


@pytest.mark.parametrize("exponent", [0.75, 0, 1, -0.5])
@pytest.mark.parametrize("user", [0, 1, 2, 3, 4])
def test_the_law(user, exponent):
    """User 4 knows every item with a count: the two others are left, evenly."""
    uniforms = keyed_uniform(torch.arange(40), 500, seed=user, dtype=torch.float64)
    drawn = PopularityNegatives(known_items(KNOWN), COUNTS, exponent).draw(
        torch.full((40,), user), uniforms)
    law = shares(KNOWN[user], COUNTS.tolist(), exponent)
    found = np.bincount(drawn.flatten().numpy(), minlength=ITEMS)
    assert found[law == 0].sum() == 0
    assert chisquare(found[law > 0], law[law > 0] * found.sum()).pvalue > 1e-3


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sets(st.integers(1, ITEMS - 1), max_size=ITEMS - 2), min_size=USERS,
                max_size=USERS),
       st.lists(st.floats(0, 1e6) | st.just(0.0), min_size=ITEMS, max_size=ITEMS),
       st.floats(-1, 2), st.integers(0, 2**32))
def test_equals_cumulative_shares(sets, counts, exponent, seed):
    counts = [0.0 if count < 1e-3 else count for count in counts]
    sampler = PopularityNegatives(known_items(dict(enumerate(sets))),
                                  torch.tensor(counts, dtype=torch.float64), exponent)
    users = torch.tensor([4, 0, 1, 3, 2, 2])
    uniforms = keyed_uniform(torch.arange(len(users)), 6, seed, torch.float64)
    drawn = sampler.draw(users, uniforms)
    for user, row, items in zip(users.tolist(), uniforms.numpy(), drawn.tolist(), strict=True):
        law = shares(sets[user], counts, exponent)
        line = np.cumsum(law)
        for u, item in zip(row, items, strict=True):
            assert law[item] > 0
            # On a border, the last bits decide.
            assert line[item - 1] - 1e-10 <= u <= line[item] + 1e-10


def test_equal_counts_are_uniform_draws():
    known = known_items(KNOWN)
    users = torch.arange(USERS)
    uniforms = keyed_uniform(users, 200, seed=5, dtype=torch.float64)
    drawn = PopularityNegatives(known, torch.full((ITEMS,), 4), 0.75).draw(users, uniforms)
    assert torch.equal(drawn, known.sample_unknown(users, uniforms))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_no_known_item_at_the_ends(uniform):
    """Known items at both ends and in between, and masses of all sizes."""
    counts = torch.logspace(-12, 12, ITEMS, dtype=torch.float64)
    known = {0: [1, 2, 5, 8], 1: [1, 8], 2: list(range(2, ITEMS)), 3: list(range(1, ITEMS - 1))}
    drawn = PopularityNegatives(known_items(known), counts, 1.0).draw(
        torch.arange(USERS), torch.full((USERS, 2), uniform, dtype=torch.float64))
    for user, items in known.items():
        assert not set(drawn[user].tolist()) & {0, *items}


def test_float32_numbers_next_to_one_stay_among_the_items():
    sampler = PopularityNegatives(known_items({0: [8]}), COUNTS, 1.0)
    assert sampler.draw(torch.tensor([0]), torch.tensor([[1 - 2**-24]])).item() == 6


def test_one_item_and_one_user():
    sampler = PopularityNegatives(known_items({}, 1, 2), torch.tensor([0, 3]), 0.75)
    assert sampler.draw(torch.tensor([0, 0]), torch.tensor([[0.0], [0.9]])).tolist() == [[1], [1]]


def test_no_rows():
    sampler = PopularityNegatives(known_items(KNOWN), COUNTS, 0.75)
    assert sampler.draw(torch.tensor([], dtype=torch.int64), torch.zeros(0, 3)).shape == (0, 3)


def test_many_users_and_items_do_not_overflow():
    """Five million users and a million items, as the largest public data sets have."""
    users, items = torch.tensor([4_999_999, 4_999_999, 3]), torch.tensor([999_999, 2, 7])
    known = KnownItems(users, items, 5_000_000, 1_000_000)
    counts = torch.zeros(1_000_000, dtype=torch.int64)
    counts[[2, 500_000, 999_999]] = torch.tensor([1, 10**9, 1])
    counts[900_000] = 1_000_000_000
    drawn = PopularityNegatives(known, counts, 1.0).draw(
        torch.tensor([4_999_999, 3]), torch.tensor([[0.0, 0.49, 0.51, 1 - 2**-53]] * 2, dtype=torch.float64))
    assert drawn.tolist() == [[500_000, 500_000, 900_000, 900_000], [2, 500_000, 900_000, 999_999]]


def test_errors_name_argument_and_value():
    known = known_items(KNOWN)
    with pytest.raises(ValueError, match=r"counts has shape \(8,\); accepted: \(9,\)"):
        PopularityNegatives(known, COUNTS[1:], 1.0)
    with pytest.raises(ValueError, match="counts has values from -3 to 12"):
        PopularityNegatives(known, torch.where(COUNTS == 3, -3, COUNTS).clamp(max=12), 1.0)
    with pytest.raises(ValueError, match="counts has values from nan"):
        PopularityNegatives(known, COUNTS * torch.nan, 1.0)
    with pytest.raises(ValueError, match="exponent=inf"):
        PopularityNegatives(known, COUNTS, float("inf"))
    sampler = PopularityNegatives(known, COUNTS, 1.0)
    with pytest.raises(ValueError, match=r"uniforms has shape \(3,\); accepted: \(2, any\)"):
        sampler.draw(torch.tensor([0, 1]), torch.zeros(3))
    everything = known_items({2: list(range(1, ITEMS))})
    with pytest.raises(ValueError, match="user 2 knows all 8 items"):
        PopularityNegatives(everything, COUNTS, 1.0).draw(torch.tensor([2]), torch.zeros(1, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_same_on_the_gpu():
    users = torch.arange(USERS)
    uniforms = keyed_uniform(users, 300, seed=1, dtype=torch.float64)
    expected = PopularityNegatives(known_items(KNOWN), COUNTS, 1.0).draw(users, uniforms)
    on_gpu = PopularityNegatives(known_items(KNOWN), COUNTS, 1.0).to("cuda")
    assert torch.equal(on_gpu.draw(users.cuda(), uniforms.cuda()).cpu(), expected)
