"""KnownItems against Python sets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from recbole_mmdiff.negatives import KnownItems

USERS, ITEMS = 7, 9
PAIRS = st.lists(st.tuples(st.integers(0, USERS - 1), st.integers(1, ITEMS - 1)), max_size=60)


def known_items(pairs):
    users, items = (torch.tensor([pair[side] for pair in pairs], dtype=torch.int64)
                    for side in (0, 1))
    return KnownItems(users, items, USERS, ITEMS)


def as_sets(pairs):
    return {user: {item for other, item in pairs if other == user} for user in range(USERS)}


@settings(max_examples=100, deadline=None)
@given(PAIRS, st.lists(st.integers(0, USERS - 1), max_size=12))
def test_rows_are_the_sets(pairs, asked):
    row, items = known_items(pairs).rows(torch.tensor(asked, dtype=torch.int64))
    expected = [(place, item) for place, user in enumerate(asked)
                for item in sorted(as_sets(pairs)[user])]
    assert list(zip(row.tolist(), items.tolist(), strict=True)) == expected


@settings(max_examples=100, deadline=None)
@given(PAIRS)
def test_contains_is_membership_also_when_broadcast(pairs):
    sets = as_sets(pairs)
    users, items = torch.arange(USERS), torch.arange(ITEMS)
    found = known_items(pairs).contains(users[:, None], items)
    assert found.tolist() == [[item in sets[user] for item in range(ITEMS)]
                              for user in range(USERS)]
    assert known_items(pairs).contains(users, torch.ones_like(users)).tolist() \
        == [1 in sets[user] for user in range(USERS)]


@settings(max_examples=100, deadline=None)
@given(PAIRS, st.lists(st.integers(0, USERS - 1), max_size=12),
       st.sets(st.integers(0, ITEMS - 1), min_size=1))
def test_among_is_contains(pairs, asked, chosen):
    users, candidates = (torch.tensor(sorted(part), dtype=torch.int64) for part in (asked, chosen))
    known = known_items(pairs)
    assert torch.equal(known.among(users, candidates), known.contains(users[:, None], candidates))


@settings(max_examples=100, deadline=None)
@given(PAIRS, st.data())
def test_the_nth_part_of_the_unit_interval_is_the_nth_unknown_item(pairs, data):
    sets = as_sets(pairs)
    able = [user for user in range(USERS) if len(sets[user]) < ITEMS - 1]
    if not able:
        return
    asked = data.draw(st.lists(st.sampled_from(able), min_size=1, max_size=8))
    numbers = data.draw(st.lists(st.lists(st.floats(0, 1, exclude_max=True), min_size=3, max_size=3),
                                 min_size=len(asked), max_size=len(asked)))
    drawn = known_items(pairs).sample_unknown(torch.tensor(asked),
                                              torch.tensor(numbers, dtype=torch.float64))
    for user, uniforms, items in zip(asked, numbers, drawn.tolist(), strict=True):
        unknown = [item for item in range(1, ITEMS) if item not in sets[user]]
        assert items == [unknown[min(int(u * len(unknown)), len(unknown) - 1)] for u in uniforms]


def test_draws_are_uniform_over_the_unknown_items():
    known = {3, 4, 8}
    sampler = known_items([(2, item) for item in known] + [(1, 1), (3, 2), (6, 8)])
    generator = torch.Generator().manual_seed(0)
    drawn = sampler.sample_unknown(torch.tensor([2]), torch.rand(1, 20000, generator=generator,
                                                                 dtype=torch.float64))
    counts = np.bincount(drawn[0].numpy(), minlength=ITEMS)
    unknown = [item for item in range(1, ITEMS) if item not in known]
    assert counts.sum() == counts[unknown].sum()
    assert chisquare(counts[unknown]).pvalue > 1e-3


def test_float32_numbers_next_to_one_stay_among_the_items():
    sampler = known_items([(0, 1)])
    top = torch.tensor([[1 - 2**-24]], dtype=torch.float32)
    assert sampler.sample_unknown(torch.tensor([0]), top).item() == ITEMS - 1


def test_a_user_who_knows_everything_is_named():
    sampler = known_items([(4, item) for item in range(1, ITEMS)])
    with pytest.raises(ValueError, match="user 4 knows all 8 items"):
        sampler.sample_unknown(torch.tensor([0, 4]), torch.zeros(2, 1))


def test_large_ids_do_not_overflow():
    """Users x items beyond 2^31, as the largest public data sets have."""
    users, items = torch.tensor([5_000_000, 5_000_000, 12]), torch.tensor([900_000, 1, 7])
    sampler = KnownItems(users, items, 5_000_001, 1_000_000)
    assert sampler.contains(users, items).all()
    assert not sampler.contains(users, torch.tensor([899_999, 2, 8])).any()
    assert sampler.sample_unknown(torch.tensor([5_000_000]), torch.zeros(1, 1)).item() == 2


def test_memory_follows_the_pairs():
    sampler = KnownItems(torch.tensor([1]), torch.tensor([2]), 1000, 10**9)
    largest = max(value.numel() for value in vars(sampler).values()
                  if isinstance(value, torch.Tensor))
    assert largest <= 1000
