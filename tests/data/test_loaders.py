"""What a stage iterates: orders, negatives, and the kinds of data."""

from collections import Counter

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.loaders import STAGE_DATA, StageLoader, UserRowsLoader, stage_loader
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.errors import ConfigError, DataError


def epoch_of(loader, epoch):
    """One epoch's batches as plain lists of rows."""
    loader.set_epoch(epoch)
    return [{field: batch[field].tolist() for field in batch} for batch in loader]


def order(batches):
    return [row for batch in batches for row in batch["sample_id"]]


def pairs(batches, field="sample_id"):
    return [row for batch in batches for row in zip(batch["user_id"], batch["item_id"],
                                                    batch["rating"], batch[field], strict=True)]


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_every_row_comes_once_an_epoch(config, train, size):
    rows = Interaction({field: train.inter_feat[field][:50] for field in train.inter_feat})
    loader = StageLoader(config, train, rows, size, seed=4)
    batches = epoch_of(loader, 0)
    assert len(loader) == len(batches) == -(-50 // size)
    assert [len(batch["sample_id"]) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert sorted(order(batches)) == list(range(50))
    for user, item, rating, number in pairs(batches):
        assert (user, item, rating) == tuple(train.inter_feat[field][number].item()
                                             for field in ("user_id", "item_id", "rating"))


def test_the_order_is_a_function_of_seed_and_epoch(config, train):
    def orders(seed):
        loader = StageLoader(config, train, train.inter_feat, 32, seed)
        return [order(epoch_of(loader, epoch)) for epoch in (0, 1, 2)]

    torch.manual_seed(0)
    first = orders(9)
    torch.manual_seed(1)
    assert orders(9) == first
    assert len({tuple(one) for one in first + orders(10)}) == 6
    loader = StageLoader(config, train, train.inter_feat, 100, 9)
    assert order(epoch_of(loader, 2)) == first[2], "neither on batch size nor on epochs before"


def test_iterating_does_not_disturb_other_random_numbers(config, train):
    state = torch.get_rng_state()
    epoch_of(StageLoader(config, train, train.inter_feat, 32, 1, negatives=1), 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("negatives", [1, 3])
def test_negatives_are_unknown_items_with_rating_zero(config, train, negatives):
    known = {}
    for user, item in zip(train.inter_feat["user_id"].tolist(),
                          train.inter_feat["item_id"].tolist(), strict=True):
        known.setdefault(user, set()).add(item)
    loader = StageLoader(config, train, train.inter_feat, 100, 2, negatives)
    batches = epoch_of(loader, 0)
    count, numbers = len(train), Counter()
    for batch in batches:
        size = len(batch["user_id"]) // (1 + negatives)
        assert batch["user_id"] == batch["user_id"][:size] * (1 + negatives)
        assert batch["timestamp"] == batch["timestamp"][:size] * (1 + negatives)
        for place, (user, item, rating, number) in enumerate(pairs([batch])):
            numbers[number] += 1
            if place < size:
                assert item in known[user]
            else:
                assert item not in known[user] and 1 <= item < train.item_num
                assert rating == 0.0
                assert number % count == batch["sample_id"][place % size]
    assert numbers == Counter(range(count * (1 + negatives)))


def test_negatives_are_drawn_by_sample_not_by_batch(config, train):
    def drawn(size, epoch):
        return sorted(pairs(epoch_of(StageLoader(config, train, train.inter_feat, size, 2, 2),
                                     epoch)))

    assert drawn(10, 0) == drawn(10**6, 0)
    assert drawn(10, 0) != drawn(10, 1)


def test_negatives_of_an_item_are_spread_over_the_unknown_ones(config, train):
    counts = np.zeros(train.item_num)
    loader = StageLoader(config, train, train.inter_feat, 512, 2, 2)
    for epoch in range(10):
        for user, item, rating, _ in pairs(epoch_of(loader, epoch)):
            counts[item] += rating == 0 and user > 0
    assert counts[0] == 0
    assert counts[1:].min() > 0.5 * counts[1:].mean()


def test_kinds_of_stage_data(config, train):
    names = train.field2id_token["user_id"]
    kinds = set(STAGE_DATA) - {"finetune"}      # There are such rows under warm_start alone.
    rows = {kind: stage_loader(config, train, kind, 64, 0).rows for kind in kinds}
    assert len(rows["target"]) == len(train)
    assert len(rows["source"]) == len(train.source)
    linked = set(train.overlap_users().tolist())
    own = {n for n, user in enumerate(train.inter_feat["user_id"].tolist()) if user in linked}
    assert len(rows["overlap_ratings"]) == len(own) > 0
    assert set(rows["overlap_ratings"]["user_id"].tolist()) == linked
    assert rows["overlap_users"]["user_id"].tolist() == sorted(linked)
    assert set(rows["side_users"]["user_id"].tolist()) \
        == set(train.inter_feat["user_id"].tolist()) - linked
    assert len(names[rows["side_users"]["user_id"]]) == 20


def test_user_loaders_carry_numbers_and_no_negatives(tiny_config):
    config = Config(config_dict=tiny_config("MF", train_neg_ratio=2))
    train = prepare_parts(config).train
    batches = epoch_of(stage_loader(config, train, "overlap_users", 10, 0), 0)
    assert set(batches[0]) == {"user_id", "sample_id"}
    users = train.overlap_users().tolist()
    assert all(users[number] == user for batch in batches
               for user, number in zip(batch["user_id"], batch["sample_id"], strict=True))
    ratings = epoch_of(stage_loader(config, train, "overlap_ratings", 10, 0), 0)
    assert sum(rating == 0 for *_, rating, _ in pairs(ratings)) \
        == 2 * sum(rating > 0 for *_, rating, _ in pairs(ratings))


def test_negatives_of_the_source_are_source_items(tiny_config):
    config = Config(config_dict=tiny_config("MF", train_neg_ratio=1))
    train = prepare_parts(config).train
    loader = stage_loader(config, train, "source", 64, 0)
    items = {item for batch in epoch_of(loader, 0) for item in batch["item_id"]}
    assert max(items) < train.source.item_num


def test_data_that_are_not_there(config, train, tiny_pair, tiny_config, atomic, tmp_path):
    with pytest.raises(ConfigError, match=r"stage data: 'targets'.*did you mean 'target'"):
        stage_loader(config, train, "targets", 10, 0)
    atomic.write(tmp_path, "src", tiny_pair.source_rows)
    atomic.write(tmp_path, "tgt", [row for row in tiny_pair.target_rows
                                   if row[0] in tiny_pair.overlap])
    other = Config(config_dict=tiny_config("MF", data_path=tmp_path))
    with pytest.raises(DataError, match="no training data of kind 'side_users'"):
        stage_loader(other, prepare_parts(other).train, "side_users", 10, 0)
    single = Config(config_dict=tiny_config("MF", dataset="tgt", source_domain=None,
                                            target_domain=None))
    part = prepare_parts(single).train
    assert len(stage_loader(single, part, "target", 10, 0).rows) == len(part)
    with pytest.raises(ConfigError, match="'source' needs a source and a target domain"):
        stage_loader(single, part, "source", 10, 0)


# ---- users with all their rows ------------------------------------------------------------------


@pytest.fixture(scope="module")
def scattered(train):
    """Training rows out of order, without those of every third user, and a user's rows by id."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(8))
    kept = order[train.inter_feat["user_id"][order] % 3 > 0]
    rows = Interaction({field: train.inter_feat[field][kept] for field in train.inter_feat})
    of_user = {}
    for number, user in enumerate(rows["user_id"].tolist()):
        of_user.setdefault(user, []).append(number)
    assert 0 < len(of_user) < train.user_num - 1 and len(set(map(len, of_user.values()))) > 1
    return rows, of_user


@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_users_come_once_with_all_their_rows(config, train, scattered, size):
    rows, of_user = scattered
    loader = UserRowsLoader(config, train, rows, size, seed=4)
    batches = epoch_of(loader, 0)
    assert len(loader) == len(batches) == -(-len(of_user) // size)
    assert loader.sample_size == len(rows), "an epoch is counted in rows, not in users"
    seen = []
    for batch in batches:
        users = list(dict.fromkeys(batch["user_id"]))
        assert batch["sample_id"] == [number for user in users for number in of_user[user]]
        seen.append(users)
    assert [len(users) for users in seen[:-1]] == [size] * (len(seen) - 1)
    assert sorted(user for users in seen for user in users) == sorted(of_user)
    for user, item, rating, number in pairs(batches):
        assert (user, item, rating) == tuple(rows[field][number].item()
                                             for field in ("user_id", "item_id", "rating"))


def test_the_order_of_users_is_a_function_of_seed_and_epoch(config, train, scattered):
    """Of nothing else, so a resumed run goes on with the epoch that it would have had."""
    def orders(seed, size=10):
        loader = UserRowsLoader(config, train, scattered[0], size, seed)
        return [order(epoch_of(loader, epoch)) for epoch in (0, 1, 2)]

    torch.manual_seed(0)
    first = orders(9)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert orders(9) == orders(9, 3) == first
    assert torch.equal(torch.get_rng_state(), state), "other random numbers are not disturbed"
    assert len({tuple(one) for one in first + orders(10)}) == 6
    assert order(epoch_of(UserRowsLoader(config, train, scattered[0], 10, 9), 2)) == first[2]


def test_samples_and_negatives_are_those_of_rows(config, train, scattered):
    """Whatever is drawn by sample is the same number, in batches of users or of rows."""
    drawn = [sorted(pairs(epoch_of(loader(config, train, scattered[0], 16, 2, 2), 1)))
             for loader in (UserRowsLoader, StageLoader)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3 * len(scattered[0])
    for batch in epoch_of(UserRowsLoader(config, train, scattered[0], 16, 2, 2), 1):
        size = len(batch["user_id"]) // 3
        assert batch["user_id"] == batch["user_id"][:size] * 3
        assert all(batch["rating"][:size]) and not any(batch["rating"][size:])


def test_one_user(config, train, scattered):
    rows, of_user = scattered
    user, numbers = next(iter(of_user.items()))
    loader = UserRowsLoader(config, train, Interaction(
        {field: rows[field][numbers] for field in rows}), 5, seed=1)
    batch, = epoch_of(loader, 3)
    assert len(loader) == 1 and batch["item_id"] == rows["item_id"][numbers].tolist()
    assert batch["sample_id"] == list(range(len(numbers))) and set(batch["user_id"]) == {user}


def test_a_stage_may_ask_for_users(config, train):
    linked = set(train.overlap_users().tolist())
    loader = stage_loader(config, train, "overlap_ratings", 8, 0, by_user=True)
    batches = epoch_of(loader, 0)
    assert {len(set(batch["user_id"])) for batch in batches[:-1]} == {8}
    expected = stage_loader(config, train, "overlap_ratings", 8, 0)
    assert sorted(pairs(batches)) == sorted(pairs(epoch_of(expected, 0)))
    assert {user for batch in batches for user in batch["user_id"]} == linked


# ---- both domains in step ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tiny_config):
    """``both(size, seed, negatives, model)``: the loader of both domains, and the data."""

    def build(size=64, seed=4, negatives=2, model="MF"):
        config = Config(config_dict=tiny_config(model, train_neg_ratio=negatives))
        train = prepare_parts(config).train
        return stage_loader(config, train, "both", size, seed), train

    return build


def sampled(batches, prefix):
    """sample id -> (user, item, rating, negatives) of a domain; a sample comes once."""
    found = {}
    for batch in batches:
        rows = zip(batch[f"{prefix}sample_id"], batch[f"{prefix}user_id"],
                   batch[f"{prefix}item_id"], batch[f"{prefix}rating"],
                   batch[f"{prefix}neg_item_id"], strict=True)
        for sample, *row in rows:
            assert sample not in found
            found[sample] = row
    return found


@pytest.mark.parametrize("size", [1, 64, 10**6])
def test_an_epoch_of_both_domains_is_the_larger_one(size, both):
    loader, train = both(size)
    small, large = sorted((len(train), len(train.source)))
    assert small < large < 2 * small, "the smaller domain begins again, and stops on the way"
    batches = epoch_of(loader, 0)
    assert len(loader) == len(batches) == -(-large // size)
    for batch in batches[:-1]:
        assert {len(values) for values in batch.values()} == {size}
    for prefix, domain in (("", train), ("source_", train.source)):
        rows, count = sampled(batches, prefix), len(domain)
        for sample, (user, item, rating, _) in rows.items():
            assert (user, item, rating) == tuple(
                domain.inter_feat[field][sample % count].item()
                for field in ("user_id", "item_id", "rating"))
        times = Counter(sample % count for sample in rows)
        assert len(rows) == large and set(times) == set(range(count))
        assert max(times.values()) == -(-large // count)


def test_both_domains_are_a_function_of_seed_and_epoch(both):
    def epochs(size, seed):
        loader, _ = both(size, seed)
        return [[sampled(epoch_of(loader, epoch), prefix) for prefix in ("", "source_")]
                for epoch in (0, 1)]

    torch.manual_seed(0)
    first = epochs(100, 9)
    torch.manual_seed(1)
    again = epochs(17, 9)
    assert again == first, "neither on the stream of random numbers nor on the batch size"
    assert [[list(rows) for rows in epoch] for epoch in again] \
        == [[list(rows) for rows in epoch] for epoch in first]
    assert first[0] != first[1] and epochs(100, 10)[0] != first[0]
    loader, train = both(100, 9)
    small = min(len(train), len(train.source))
    target, source = ([sample % small for sample in rows][:small] for rows in first[0])
    assert target != source, "each domain has a permutation of its own"
    assert sampled(epoch_of(loader, 1), "") == first[1][0], "whatever epoch came before"


def test_negatives_of_both_domains_are_unknown_in_their_domain(both):
    loader, train = both(negatives=3)
    batches = epoch_of(loader, 1)
    for prefix, domain in (("", train), ("source_", train.source)):
        known = set(zip(domain.inter_feat["user_id"].tolist(),
                        domain.inter_feat["item_id"].tolist(), strict=True))
        rows, drawn = sampled(batches, prefix), np.zeros(domain.item_num)
        for user, item, _, negatives in rows.values():
            assert (user, item) in known and len(negatives) == 3
            for negative in negatives:
                assert (user, negative) not in known and 1 <= negative < domain.item_num
                drawn[negative] += 1
        assert drawn[1:].min() > 0
        if len(domain) < len(rows):
            again = [sample for sample in rows if sample >= len(domain)]
            assert any(rows[sample][3] != rows[sample - len(domain)][3] for sample in again), \
                "a row that comes again is a sample of its own"


def test_a_ranking_model_sees_the_positive_rows_of_both_domains(both):
    loader, train = both(model="BiTGCF", negatives=1)
    batches = epoch_of(loader, 0)
    for prefix, domain in (("", train), ("source_", train.source)):
        positive = {pair for *pair, rating in zip(
            domain.inter_feat["user_id"].tolist(), domain.inter_feat["item_id"].tolist(),
            domain.ratings.tolist(), strict=True) if rating >= 4
            for pair in [tuple(pair)]}
        seen = {tuple(row[:2]) for row in sampled(batches, prefix).values()}
        assert seen == positive
    assert min(train.source.ratings) < 4, "the source's other rows are still there"


def test_both_domains_without_negatives_or_without_one_domain(both, tiny_config):
    batches = epoch_of(both(negatives=0)[0], 0)
    assert not [field for field in batches[0] if "neg_" in field]
    with pytest.raises(DataError, match="positive_rating: no rating of src reaches"):
        config = Config(config_dict=tiny_config(
            "BiTGCF", target_domain={"dataset": "tgt", "positive_rating": 4.0},
            positive_rating=4.0, source_domain={"dataset": "src", "positive_rating": 6.0}))
        stage_loader(config, prepare_parts(config).train, "both", 10, 0)
