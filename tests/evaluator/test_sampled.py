"""Sampled rankings: the candidates of uniN and popN, and what ranks among them."""

import pytest
import torch

from recbole_mmdiff.evaluator.sampled import sampled_candidates
from recbole_mmdiff.negatives import KnownItems
from recbole_mmdiff.quick_start import run

USERS, ITEMS = 6, 40


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(5)
    users = torch.randint(1, USERS, (50,), generator=generator)
    items = torch.randint(1, ITEMS, (50,), generator=generator)
    known = KnownItems(users, items, USERS, ITEMS)
    positives = KnownItems(torch.tensor([0, 0, 1]), torch.stack(
        [known.rows(torch.tensor([user]))[1][place] for user, place in ((2, 0), (2, 1), (4, 0))]),
        2, ITEMS)
    return known, positives, torch.tensor([2, 4]), items


@pytest.mark.parametrize("mode", ["uni7", "pop7"])
def test_candidates_are_the_positives_and_unknown_items(case, mode):
    known, positives, users, train_items = case
    drawn = sampled_candidates(mode, positives, users, known, train_items, seed=3)
    for request, user in enumerate(users.tolist()):
        mine = set(drawn.rows(torch.tensor([request]))[1].tolist())
        good = set(positives.rows(torch.tensor([request]))[1].tolist())
        liked = set(known.rows(torch.tensor([user]))[1].tolist())
        assert good <= mine and 0 not in mine
        assert not (mine - good) & liked
        assert 1 <= len(mine - good) <= 7 * len(good)


def test_candidates_are_frozen_by_the_seed(case):
    known, positives, users, train_items = case
    first, second, other = (
        sampled_candidates("uni7", positives, users, known, train_items, seed).items
        for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert len(first) != len(other) or not torch.equal(first, other)


def test_popularity_draws_follow_the_training_rows(case):
    """Item 7 has nine tenths of the rows, so it fills most of the draws of a user without it."""
    _, _, _, _ = case
    known = KnownItems(torch.tensor([1]), torch.tensor([3]), 2, ITEMS)
    positives = KnownItems(torch.zeros(1, dtype=torch.long), torch.tensor([3]), 1, ITEMS)
    rows = torch.cat([torch.full((900,), 7), torch.randint(8, ITEMS, (100,))])
    found = torch.zeros(ITEMS)
    for seed in range(200):
        drawn = sampled_candidates("pop1", positives, torch.tensor([1]), known, rows, seed).items
        found[drawn] += 1
    assert found[7] > 150


def test_a_run_with_uni_candidates_ranks_higher_than_a_full_one(tiny_config, tmp_path):
    """The same model among fewer candidates: its hits can only rise."""
    results = {}
    for mode in ("full", "uni5"):
        keys = tiny_config("BPR", epochs=1, eval_args={"mode": mode})
        results[mode] = run(config_dict=keys, output=tmp_path / mode).metrics["test"]
    full, sampled = results["full"]["ranking_full"], results["uni5"]["ranking_sampled"]
    assert "ranking_full" not in results["uni5"]
    assert sampled["hit@10"] >= full["hit@10"] and sampled["mrr@10"] >= full["mrr@10"]
