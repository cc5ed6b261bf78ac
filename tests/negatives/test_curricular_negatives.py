"""Curricular negatives against sorted lists, one row after the other."""

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from recbole_mmdiff.diffusion import keyed_uniform
from recbole_mmdiff.negatives import KnownItems, candidate_items, curricular_negatives

USERS, ITEMS, SIZE = 6, 15, 4


def known_items(sets, num_users=USERS, num_items=ITEMS):
    pairs = [(user, item) for user, items in enumerate(sets) for item in items]
    users, items = (torch.tensor([pair[side] for pair in pairs], dtype=torch.int64)
                    for side in (0, 1))
    return KnownItems(users, items, num_users, num_items)


def allowed(known, positive, candidates):
    return sorted(set(candidates) - {0, positive} - set(known))


def top_of(left, positive, pool, share):
    """The most similar of the items left, as many as the share, written as a decimal, asks for."""
    number = ceil(Fraction(str(share)) * len(left))
    return sorted(left, key=lambda item: -float(pool[positive] @ pool[item]))[:number]


def loop_curricular(pool, sets, users, positives, candidates, share, uniforms):
    result = []
    for user, positive, row in zip(users, positives, uniforms, strict=True):
        left = allowed(sets[user], positive, candidates)
        ranked = top_of(left, positive, pool, share)
        ranked = ranked or [item for item in range(1, ITEMS) if item not in sets[user]]
        result.append([ranked[int(u * len(ranked))] for u in row])
    return result


@st.composite
def cases(draw):
    sets = [draw(st.sets(st.integers(1, ITEMS - 1), max_size=ITEMS - 2)) for _ in range(USERS)]
    users = draw(st.lists(st.integers(0, USERS - 1), max_size=8))
    positives = draw(st.lists(st.integers(1, ITEMS - 1), min_size=len(users), max_size=len(users)))
    candidates = draw(st.lists(st.integers(0, ITEMS - 1), max_size=20))
    share = draw(st.sampled_from([0.01, 0.1, 0.25, 0.3, 0.7, 1]))
    return sets, users, positives, candidates, share, draw(st.integers(0, 2**32))


def call(pool, sets, users, positives, candidates, share, uniforms, **keys):
    users, positives, candidates = (torch.tensor(ids, dtype=torch.int64)
                                    for ids in (users, positives, candidates))
    return curricular_negatives(pool, known_items(sets), users, positives, candidates, share, uniforms,
                                **keys)


@settings(max_examples=200, deadline=None)
@given(cases(), st.sampled_from([1, 7, 40, 2**24]))
def test_equals_sorted_lists_for_any_block(case, block_elements):
    *rows, share, seed = case
    pool = torch.tensor(np.random.default_rng(seed).normal(size=(ITEMS, SIZE)))
    uniforms = keyed_uniform(torch.arange(len(rows[1])), 3, seed, torch.float64)
    found = call(pool, *rows, share, uniforms, block_elements=block_elements)
    assert found.shape == uniforms.shape
    assert found.tolist() == loop_curricular(pool.numpy(), *rows, share, uniforms.tolist())
    for user, items in zip(rows[1], found.tolist(), strict=True):
        assert not set(items) & {0, *rows[0][user]}


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_ties_stay_within_the_share_and_do_not_depend_on_the_rows(case, dtype):
    """Small whole numbers: exact in every type, with many ties."""
    sets, users, positives, candidates, share, seed = case
    pool = torch.tensor(np.random.default_rng(seed).integers(-1, 2, (ITEMS, SIZE)), dtype=dtype)
    uniforms = keyed_uniform(torch.arange(len(users)), 3, seed, torch.float64)
    found = call(pool, sets, users, positives, candidates, share, uniforms)
    values = pool.double().numpy()
    for row, (user, positive) in enumerate(zip(users, positives, strict=True)):
        left = allowed(sets[user], positive, candidates)
        if left:
            lowest = values[positive] @ values[top_of(left, positive, values, share)[-1]]
            assert set(found[row].tolist()) <= set(left)
            assert (values[found[row]] @ values[positive] >= lowest).all()
        alone = call(pool, sets, [user], [positive], candidates, share, uniforms[row:row + 1])
        assert torch.equal(alone[0], found[row])


def test_draws_are_uniform_over_the_top_share():
    draw = np.random.default_rng(3)
    pool = torch.tensor(draw.normal(size=(ITEMS, SIZE)))
    sets = [{2, 5}, set(range(1, 8)), set(), {14}, {1, 2, 3}, set(range(1, ITEMS)) - {9}]
    candidates = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    for user, positive in ((0, 4), (1, 7), (2, 14), (3, 12)):
        uniforms = keyed_uniform(torch.arange(40), 300, user, torch.float64)
        found = call(pool, sets, [user] * 40, [positive] * 40, candidates, 0.4, uniforms)
        top = top_of(allowed(sets[user], positive, candidates), positive, pool.numpy(), 0.4)
        counts = np.bincount(found.flatten().numpy(), minlength=ITEMS)
        assert counts[top].sum() == 12_000
        assert len(top) == 1 or chisquare(counts[top]).pvalue > 1e-3


def test_nothing_left_is_a_uniform_unknown_item():
    """The candidates are the positive, known items and padding, beside a row with a choice."""
    sets = [{3, 4}, set(), set(), set(), set(), set()]
    uniforms = keyed_uniform(torch.arange(2), 4000, 0, torch.float64)
    found = call(torch.ones(ITEMS, SIZE), sets, [0, 1], [6, 6], [0, 3, 4, 6], 0.5, uniforms)
    unknown = [item for item in range(1, ITEMS) if item not in sets[0]]
    counts = np.bincount(found[0].numpy(), minlength=ITEMS)
    assert counts[unknown].sum() == 4000 and chisquare(counts[unknown]).pvalue > 1e-3
    assert len(set(found[1].tolist())) == 1 and set(found[1].tolist()) <= {3, 4}


def test_one_item():
    known = KnownItems(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64), 1, 2)
    user, positive, uniforms = torch.tensor([0]), torch.tensor([1]), torch.zeros(1, 1)
    found = curricular_negatives(torch.ones(2, 1), known, user, positive, torch.tensor([1]), 0.1,
                                 uniforms)
    assert found.item() == 1


def test_a_pool_with_gradients_gives_items_without():
    pool = torch.randn(ITEMS, SIZE, requires_grad=True)
    found = call(pool, [set()] * USERS, [0], [1], [2, 3], 1, torch.zeros(1, 1))
    assert not found.requires_grad


@pytest.mark.parametrize("autocast", [False, True])
def test_large_half_vectors_do_not_overflow(autocast):
    """Inner products beyond 65,504, the largest float16."""
    pool = torch.tensor([0.0, 300.0, 301.0, 302.0], dtype=torch.float16)[:, None]
    known = KnownItems(torch.tensor([0]), torch.tensor([1]), 1, 4)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        found = curricular_negatives(pool, known, torch.tensor([0]), torch.tensor([1]),
                                     torch.tensor([2, 3]), 0.5, torch.zeros(1, 1))
    assert found.item() == 3


@pytest.mark.parametrize("top", [1 - 2**-53, torch.tensor(1 - 2**-24, dtype=torch.float32)])
def test_numbers_next_to_one_take_the_last_of_the_share(top):
    pool = -torch.arange(1.0, ITEMS + 1)[:, None]
    uniforms = torch.as_tensor(top, dtype=getattr(top, "dtype", torch.float64)).view(1, 1)
    found = call(pool, [{2}] + [set()] * (USERS - 1), [0], [1], range(ITEMS), 0.5, uniforms)
    assert found.item() == ITEMS - 6


@pytest.mark.parametrize("num_items, share, count", [(71, 0.1, 7), (72, 0.1, 8), (2, 0.01, 1), (101, 0.07, 7),
                                                     (50, 1, 49)])
def test_candidates_are_a_share_of_distinct_items(num_items, share, count):
    found = candidate_items(num_items, share, 5, "cpu")
    assert len(set(found.tolist())) == len(found) == count
    assert found.min() >= 1 and found.max() < num_items


def test_candidates_depend_on_the_seed_alone_and_are_uniform():
    torch.manual_seed(0)
    first = candidate_items(1000, 0.1, 5, "cpu")
    torch.manual_seed(1)
    assert torch.equal(candidate_items(1000, 0.1, 5, "cpu"), first)
    assert not torch.equal(candidate_items(1000, 0.1, 6, "cpu"), first)
    counts = torch.stack([torch.bincount(candidate_items(21, 0.25, seed, "cpu"), minlength=21)
                          for seed in range(2000)]).sum(0)
    assert counts[0] == 0 and chisquare(counts[1:].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("changed, message", [
    ({"share": 0}, r"share=0 must lie in \(0, 1\]"), ({"share": 1.5}, "share=1.5"),
    ({"share": float("nan")}, "share=nan"),
    ({"pool": torch.ones(ITEMS - 1, 2)}, r"pool has shape \(14, 2\); accepted: \(15, any\)"),
    ({"pool": torch.ones(ITEMS)}, r"pool has shape \(15,\)"),
    ({"positives": torch.tensor([1])}, r"positives has shape \(1,\); accepted: \(2,\)"),
    ({"uniforms": torch.zeros(2)}, r"uniforms has shape \(2,\); accepted: \(2, any\)"),
    ({"block_elements": 0}, "block_elements=0 must be at least 1"),
    ({"users": torch.tensor([0, 3])}, "user 3 knows all 14 items"),
])
def test_errors_name_argument_and_value(changed, message):
    arguments = {
        "pool": torch.ones(ITEMS, SIZE), "known": known_items([[], [], [], range(1, ITEMS)]),
        "users": torch.tensor([0, 1]), "positives": torch.tensor([1, 2]),
        "candidates": torch.tensor([3, 4, 5]), "share": 0.1, "uniforms": torch.zeros(2, 1)}
    with pytest.raises(ValueError, match=message):
        curricular_negatives(**{**arguments, **changed})


def test_errors_of_candidates():
    with pytest.raises(ValueError, match="num_items=1 must be at least 2"):
        candidate_items(1, 0.1, 0, "cpu")
    with pytest.raises(ValueError, match="share=0"):
        candidate_items(5, 0, 0, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_same_on_the_gpu():
    assert torch.equal(candidate_items(1000, 0.1, 5, "cuda").cpu(), candidate_items(1000, 0.1, 5, "cpu"))
    draw = np.random.default_rng(3)
    pool = torch.tensor(draw.normal(size=(ITEMS, SIZE)))
    sets = [set(draw.integers(1, ITEMS, 5).tolist()) for _ in range(USERS)]
    users, positives = torch.arange(USERS), torch.tensor(draw.integers(1, ITEMS, USERS))
    candidates, uniforms = torch.arange(3, 12), torch.tensor(draw.random((USERS, 50)))
    known = known_items(sets)
    expected = curricular_negatives(pool, known, users, positives, candidates, 0.4, uniforms)
    on_gpu = curricular_negatives(pool.cuda(), known.to("cuda"), users.cuda(), positives.cuda(),
                                  candidates.cuda(), 0.4, uniforms.cuda())
    assert torch.equal(on_gpu.cpu(), expected)
