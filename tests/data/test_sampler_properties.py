"""Loaders and their negatives for any rows, sizes and seeds."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from scipy.stats import chisquare

from recbole_mmdiff.data.loaders import NegativeItems, StageLoader, UserRowsLoader
from recbole_mmdiff.diffusion import fold_in, keyed_normal, keyed_uniform
from recbole_mmdiff.errors import DataError

USERS, ITEMS = 5, 8
PAIRS = st.sets(st.tuples(st.integers(1, USERS - 1), st.integers(1, ITEMS - 1)), min_size=1, max_size=20)
PROTOCOLS = st.sampled_from(["cold_start_users", "cold_start_items"])


def negatives(pairs, protocol="cold_start_users"):
    """The sampler of a domain with these rows."""
    users, items = (torch.tensor(side) for side in zip(*sorted(pairs), strict=True))
    names = {"user_id": [f"u{user}" for user in range(USERS)]}
    dataset = SimpleNamespace(
        uid_field="user_id", iid_field="item_id", user_num=USERS, item_num=ITEMS, dataset_name="toy",
        field2id_token=names, config={"split_protocol": protocol, "train_neg_ratio": 1})
    return NegativeItems(dataset, Interaction({"user_id": users, "item_id": items}))


@settings(max_examples=60)
@given(PAIRS, st.integers(0, 2**40), st.integers(1, 7), PROTOCOLS)
def test_negatives_are_unknown_items_in_whatever_chunks(pairs, seed, size, protocol):
    known = {user: {item for one, item in pairs if one == user} for user, _ in pairs}
    drawable = set(range(1, ITEMS)) if protocol == "cold_start_users" else set.union(*known.values())
    if any(drawable <= own for own in known.values()):
        with pytest.raises(DataError, match=r"toy: user 'u\d' has rated every item"):
            negatives(pairs, protocol)
        return
    sampler = negatives(pairs, protocol)
    users = torch.tensor([user for user, _ in sorted(pairs)])
    uniforms = keyed_uniform(torch.arange(len(users)), 6, seed, torch.float64)
    drawn = sampler.draw(users, uniforms)
    for user, items in zip(users.tolist(), drawn.tolist(), strict=True):
        assert set(items) <= drawable - known[user]
    pieces = [sampler.draw(*part) for part in zip(users.split(size), uniforms.split(size), strict=True)]
    assert torch.equal(torch.cat(pieces), drawn)


def test_negatives_are_uniform_over_the_unknown_items():
    known = {2, 5, 6}
    sampler = negatives({(3, item) for item in known} | {(1, 1)})
    uniforms = keyed_uniform(torch.arange(4000), 5, 7, torch.float64)
    counts = np.bincount(sampler.draw(torch.full((4000,), 3), uniforms).flatten(), minlength=ITEMS)
    unknown = sorted(set(range(1, ITEMS)) - known)
    assert counts.sum() == counts[unknown].sum() and chisquare(counts[unknown]).pvalue > 1e-3


@settings(max_examples=40)
@given(st.lists(st.integers(-2**63, 2**63 - 1), max_size=8), st.integers(1, 6), st.integers(-2**70, 2**70),
       st.integers(1, 8), st.sampled_from([keyed_normal, keyed_uniform]))
def test_noise_follows_from_seed_key_and_column_alone(keys, dim, seed, size, draw):
    keys = torch.tensor(keys, dtype=torch.int64)
    whole = draw(keys, dim, seed)
    assert whole.isfinite().all()
    assert torch.equal(torch.cat([draw(part, dim, seed) for part in keys.split(size)]), whole)
    assert torch.equal(draw(keys, dim + 3, seed)[:, :dim], whole)
    assert torch.equal(draw(keys.flip(0), dim, seed).flip(0), whole)
    assert fold_in(seed, dim) == fold_in(seed, dim) != fold_in(seed, dim + 1)


@pytest.mark.parametrize("kind", [StageLoader, UserRowsLoader])
@settings(max_examples=20)
@given(rows=st.integers(1, 60), size=st.integers(1, 70), seed=st.integers(0, 2**62), epoch=st.integers(0, 9))
def test_an_epoch_is_a_permutation_of_the_rows(config, train, kind, rows, size, seed, epoch):
    part = Interaction({field: train.inter_feat[field][:rows] for field in train.inter_feat})
    loader = kind(config, train, part, size, seed)
    loader.set_epoch(epoch)
    batches = list(loader)
    numbers = torch.cat([batch["sample_id"] for batch in batches])
    assert len(batches) == len(loader) and sorted(numbers.tolist()) == list(range(rows))
    users = torch.cat([batch["user_id"] for batch in batches])
    assert torch.equal(users, part["user_id"][numbers])
    assert torch.equal(torch.cat([batch["sample_id"] for batch in loader]), numbers)
