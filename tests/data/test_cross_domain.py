"""The cross-domain data set against the files, read by the csv module."""

import hashlib
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.cross_domain import CrossDomainDataset, merged_view
from recbole_mmdiff.data.preparation import create_dataset, prepare_parts
from recbole_mmdiff.data.splits import SavedSplit
from recbole_mmdiff.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def build(config):
    """The data set and its [train, valid, test]."""
    dataset = CrossDomainDataset(Config(config_dict=config))
    return dataset, dataset.build()


def tokens(dataset):
    """(user, item, rating, time) of every row: tokens and numbers."""
    inter = dataset.inter_feat
    users = dataset.field2id_token[dataset.uid_field][inter[dataset.uid_field].numpy()]
    items = dataset.field2id_token[dataset.iid_field][inter[dataset.iid_field].numpy()]
    return [(str(u), str(i), r, t) for u, i, r, t in
            zip(users, items, inter["rating"].tolist(), inter["timestamp"].tolist(), strict=True)]


def numbers(rows):
    return [(user, item, float(rating), float(time)) for user, item, rating, time in rows]


def users_of(dataset):
    return {row[0] for row in tokens(dataset)}


def items_of(dataset):
    return {row[1] for row in tokens(dataset)}


# ---- ids ----------------------------------------------------------------------------------------


def test_user_ids_are_pad_overlap_target_only_source_only(tiny_pair, tiny_config):
    dataset, _ = build(tiny_config("BPR"))
    target = list(dataset.field2id_token["user_id"])
    source = list(dataset.source.field2id_token["user_id"])
    assert target == ["[PAD]", *tiny_pair.overlap, *tiny_pair.target_only]
    assert source == ["[PAD]", *tiny_pair.overlap, *[""] * 20, *tiny_pair.source_only]
    assert (dataset.num_overlap, dataset.user_num, dataset.source.user_num) == (60, 81, 101)
    for user in tiny_pair.overlap:
        assert dataset.token2id("user_id", user) == dataset.source.token2id("user_id", user)


def test_item_ids_follow_the_tokens_of_each_domain(tiny_pair, tiny_config):
    dataset, _ = build(tiny_config("BPR"))
    for part, rows in ((dataset, tiny_pair.target_rows), (dataset.source, tiny_pair.source_rows)):
        expected = ["[PAD]", *sorted({row[1] for row in rows})]
        assert list(part.field2id_token["item_id"]) == expected
        assert part.item_num == len(expected)
    assert dataset.num_candidates == dataset.item_num


@pytest.mark.parametrize("protocol", ["cold_start_users", "warm_start", "ratio"])
def test_every_row_of_the_files_stands_in_exactly_one_part(tiny_pair, tiny_config, atomic, protocol):
    _, parts = build(tiny_config("BPR", split_protocol=protocol))
    found = Counter(row for part in parts for row in tokens(part))
    if parts[0].finetune is not None:
        found += Counter(tokens(parts[0].finetune))
    assert found == Counter(numbers(atomic.read(tiny_pair.folder / "tgt" / "tgt.inter")))
    sources = {id(part.source): part.source for part in parts}.values()
    found = Counter(row for source in sources for row in tokens(source))
    assert found == Counter(numbers(atomic.read(tiny_pair.folder / "src" / "src.inter")))


def test_the_order_of_the_files_does_not_matter(tiny_pair, tiny_config, atomic, tmp_path):
    for name, rows in (("src", tiny_pair.source_rows), ("tgt", tiny_pair.target_rows)):
        atomic.write(tmp_path, name, random.Random(1).sample(rows, len(rows)))
    for protocol in ("cold_start_users", "warm_start", "cold_start_items", "ratio"):
        keys = {"split_protocol": protocol, "test_item_ratio": 0.4, "valid_item_ratio": 0.4}
        one, other = (build(tiny_config("BPR", data_path=folder, **keys))[1]
                      for folder in (tiny_pair.folder, tmp_path))
        for mine, same in zip(one, other, strict=True):
            for part, copy in ((mine, same), (mine.source, same.source)):
                for field in part.inter_feat:
                    assert torch.equal(part.inter_feat[field], copy.inter_feat[field]), protocol


def test_python_hashing_does_not_matter(tiny_config):
    code = f"""
import hashlib
from recbole_mmdiff.config import Config
from recbole_mmdiff.data.cross_domain import CrossDomainDataset
digest = hashlib.sha256()
for protocol in ("cold_start_users", "warm_start", "cold_start_items", "ratio"):
    config = {tiny_config("BPR", test_item_ratio=0.4, valid_item_ratio=0.4)!r}
    config |= {{"split_protocol": protocol, "overlap_ratio": 0.8, "overlap_mode": "split"}}
    for part in CrossDomainDataset(Config(config_dict=config)).build():
        for field in part.inter_feat:
            digest.update(part.inter_feat[field].numpy().tobytes())
            digest.update(part.source.inter_feat[field].numpy().tobytes())
print(digest.hexdigest())
"""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    digests = {subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True,
        env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}).stdout
        for seed in ("1", "77")}
    assert len(digests) == 1 and len(digests.pop().strip()) == 64


# ---- protocols ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.8])
def test_sizes_of_cold_start_users(tiny_pair, tiny_config, beta):
    _, (train, valid, test) = build(tiny_config("BPR", test_user_ratio=beta, valid_user_ratio=0.1))
    count = round(beta * 60)
    assert len(users_of(test)) == count
    assert len(users_of(valid)) == round(0.1 * (60 - count))
    held = users_of(test) | users_of(valid)
    assert held <= set(tiny_pair.overlap)
    assert not held & users_of(train)
    assert held <= users_of(train.source)


def test_test_users_of_a_smaller_share_are_among_those_of_a_larger(tiny_config):
    test = [users_of(build(tiny_config("BPR", test_user_ratio=beta))[1][2])
            for beta in (0.2, 0.5, 0.8)]
    assert test[0] < test[1] < test[2]


@pytest.mark.parametrize("protocol", ["cold_start_users", "warm_start", "cold_start_items"])
@pytest.mark.parametrize("view", ["target", "merged"])
def test_no_view_shows_training_rows_of_held_out_users(tiny_config, protocol, view):
    parts = prepare_parts(Config(config_dict=tiny_config(
        "MF", split_protocol=protocol, domain_view=view, test_item_ratio=0.4,
        valid_item_ratio=0.4)))
    held = users_of(parts.valid) | users_of(parts.test)
    assert held
    target_items = set(parts.observed.field2id_token["item_id"][1:])
    leaked = {row for row in tokens(parts.train) if row[0] in held and row[1] in target_items}
    assert not leaked
    if view == "merged":
        assert {row[0] for row in tokens(parts.train)} >= held


def test_warm_start_keeps_later_rows_for_the_test(tiny_config):
    _, (train, valid, test) = build(tiny_config("BPR", split_protocol="warm_start"))
    fine = tokens(train.finetune)
    assert {row[0] for row in fine} == users_of(test) | users_of(valid)
    for user in users_of(test):
        early = [time for other, _, _, time in fine if other == user]
        late = [row[3] for row in tokens(test) if row[0] == user]
        assert max(early) <= min(late)
        assert len(late) - len(early) in (0, 1)


def test_no_training_row_holds_a_held_out_item(tiny_config):
    dataset, (train, valid, test) = build(tiny_config(
        "BPR", split_protocol="cold_start_items", test_user_ratio=0.5, valid_user_ratio=0.4,
        test_item_ratio=0.3, valid_item_ratio=0.3))
    assert not items_of(train) & (items_of(test) | items_of(valid))
    assert not items_of(valid) & items_of(test)
    assert len(items_of(test)) == round(0.3 * 50)
    assert len(train) + len(valid) + len(test) < len(dataset)


def test_ratio_splits_both_domains(tiny_config):
    dataset, parts = build(tiny_config("BPR", split_protocol="ratio"))
    for whole, pieces in ((dataset, parts), (dataset.source, [part.source for part in parts])):
        sizes = [len(piece) / len(whole) for piece in pieces]
        assert sizes == pytest.approx([0.8, 0.1, 0.1], abs=0.04)
        assert sum(map(len, pieces)) == len(whole)


def test_ratio_is_the_split_of_recbole_itself(tiny_config):
    """Same data set, same seed: RecBole's order of calls gives the very same rows."""
    from recbole.data.dataset import Dataset
    from recbole.utils import init_seed

    config = Config(config_dict=tiny_config("BPR", split_protocol="ratio"))
    ours = CrossDomainDataset(config).build()
    init_seed(config["seed"], True)
    theirs = Dataset.build(CrossDomainDataset(config))
    assert [tokens(part) for part in ours] == [tokens(part) for part in theirs]


@pytest.mark.parametrize("protocol", ["cold_start_users", "ratio"])
def test_the_seed_of_the_split_is_apart_from_the_seed(tiny_config, protocol):
    def test_rows(**keys):
        return sorted(tokens(build(tiny_config("BPR", split_protocol=protocol, **keys))[1][2]))

    by_seed = test_rows(seed=1)
    assert by_seed != test_rows(seed=2)
    assert by_seed == test_rows(seed=2, split_seed=1)
    assert by_seed == test_rows(seed=1, split_seed=1) != test_rows(seed=1, split_seed=0)


def test_building_does_not_disturb_other_random_numbers(tiny_config):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(tiny_config("BPR", split_protocol="ratio"))
    assert torch.equal(torch.rand(3), expected)


# ---- saved splits -------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [
    {"split_protocol": "cold_start_users"}, {"split_protocol": "warm_start"},
    {"split_protocol": "cold_start_items", "test_item_ratio": 0.4, "valid_item_ratio": 0.4},
    {"split_protocol": "ratio"},
    {"split_protocol": "cold_start_users", "overlap_ratio": 0.5},
    {"split_protocol": "cold_start_users", "overlap_ratio": 0.5, "overlap_mode": "split"},
], ids=lambda keys: "-".join(map(str, keys.values())))
def test_a_saved_split_gives_the_same_parts_whatever_the_keys_say(tiny_config, tmp_path, keys):
    dataset, parts = build(tiny_config("BPR", **keys))
    parts[0].saved_split.save(tmp_path / "split.npz")
    loaded, again = build(tiny_config("BPR", seed=99, test_user_ratio=0.7,
                                      split_file=str(tmp_path / "split.npz")))
    assert loaded.num_overlap == dataset.num_overlap
    assert loaded.config["split_protocol"] == keys["split_protocol"]
    for part, same in zip(parts, again, strict=True):
        assert sorted(tokens(part)) == sorted(tokens(same))
        assert sorted(tokens(part.source)) == sorted(tokens(same.source))
    for field in ("user_id", "item_id"):
        assert list(loaded.field2id_token[field]) == list(dataset.field2id_token[field])
        assert list(loaded.source.field2id_token[field]) \
            == list(dataset.source.field2id_token[field])
    assert (parts[0].finetune is None) == (again[0].finetune is None)
    if parts[0].finetune is not None:
        assert sorted(tokens(parts[0].finetune)) == sorted(tokens(again[0].finetune))
    saved, resaved = parts[0].saved_split, again[0].saved_split
    for name in ("protocol", "linked", "source_gone", "target_gone"):
        assert np.array_equal(getattr(saved, name), getattr(resaved, name))


def test_a_saved_split_of_other_data_is_refused(tiny_config, make_tiny_pair, tmp_path):
    _, parts = build(tiny_config("BPR"))
    parts[0].saved_split.save(tmp_path / "split.npz")
    make_tiny_pair(tmp_path, seed=8)
    with pytest.raises(DataError, match=r"split_file: .*split\.npz"):
        build(tiny_config("BPR", data_path=tmp_path, split_file=str(tmp_path / "split.npz")))


def test_a_saved_split_links_nobody_unknown(tiny_config, tmp_path):
    nobody = np.array([], dtype=str)
    SavedSplit("cold_start_users", np.array(["stranger"]), nobody, nobody, nobody).save(
        tmp_path / "split.npz")
    with pytest.raises(DataError, match=r"split\.npz links the user 'stranger'"):
        build(tiny_config("BPR", split_file=str(tmp_path / "split.npz")))


# ---- links --------------------------------------------------------------------------------------


def test_unlinked_users_become_two(tiny_pair, tiny_config):
    dataset, _ = build(tiny_config("BPR", overlap_ratio=0.5))
    linked = set(dataset.vocabulary.target[1:31])
    assert dataset.num_overlap == 30 and linked <= set(tiny_pair.overlap)
    assert sorted(tokens(dataset.source)) == sorted(numbers(tiny_pair.source_rows))
    for user in tiny_pair.overlap:
        here, there = (part.token2id("user_id", user) for part in (dataset, dataset.source))
        assert (here == there) == (user in linked)
    assert dataset.source.user_num == 1 + 30 + 50 + 50


def test_split_users_lose_the_rows_of_one_domain(tiny_pair, tiny_config):
    dataset, _ = build(tiny_config("BPR", overlap_ratio=0.5, overlap_mode="split"))
    linked = set(dataset.vocabulary.target[1:31])
    here, there = users_of(dataset), users_of(dataset.source)
    for user in set(tiny_pair.overlap) - linked:
        assert (user in here) != (user in there)
    for user in linked:
        assert user in here and user in there
    assert set(tiny_pair.target_only) <= here and set(tiny_pair.source_only) <= there


def test_a_link_file_joins_different_tokens(tiny_pair, tiny_config, atomic, tmp_path):
    """Renamed source users, linked by file, give the split of equal tokens."""
    renamed = [(f"x{row[0]}", *row[1:]) for row in tiny_pair.source_rows]
    atomic.write(tmp_path, "src", renamed)
    atomic.write(tmp_path, "tgt", tiny_pair.target_rows)
    links = ["source\ttarget", *[f"x{user}\t{user}" for user in tiny_pair.overlap]]
    (tmp_path / "links.tsv").write_text("\n".join(links))
    dataset, parts = build(tiny_config("BPR", data_path=tmp_path,
                                       user_link_file_path=str(tmp_path / "links.tsv")))
    _, plain = build(tiny_config("BPR"))
    for part, same in zip(parts, plain, strict=True):
        assert torch.equal(part.inter_feat["user_id"], same.inter_feat["user_id"])
        assert torch.equal(part.source.inter_feat["user_id"], same.source.inter_feat["user_id"])
    assert dataset.source.token2id("user_id", "x" + tiny_pair.overlap[3]) \
        == dataset.token2id("user_id", tiny_pair.overlap[3])


def test_users_by_kind(tiny_pair, tiny_config):
    _, (train, valid, test) = build(tiny_config("BPR"))
    names = train.field2id_token["user_id"]
    held = users_of(valid) | users_of(test)
    assert set(names[train.overlap_users()]) == set(tiny_pair.overlap) - held
    assert set(names[train.side_users()]) == set(tiny_pair.target_only)


# ---- the merged view ----------------------------------------------------------------------------


def test_the_merged_view_is_the_union(tiny_pair, tiny_config):
    dataset, (train, _, test) = build(tiny_config("BPR"))
    merged, ranked = merged_view(train, True), merged_view(test, False)
    assert merged.item_num == ranked.item_num == 50 + 40 + 1
    assert merged.user_num == ranked.user_num == 101
    assert merged.num_candidates == ranked.num_candidates == dataset.item_num == 51
    assert sorted(tokens(merged)) == sorted(tokens(train) + numbers(tiny_pair.source_rows))
    assert sorted(tokens(ranked)) == sorted(tokens(test))
    shift = dataset.item_num - 1
    rows = len(train)
    assert torch.equal(merged.inter_feat["item_id"][:rows], train.inter_feat["item_id"])
    assert torch.equal(merged.inter_feat["item_id"][rows:],
                       dataset.source.inter_feat["item_id"] + shift)
    assert (merged.inter_feat["item_id"][rows:] >= merged.num_candidates).all()
    assert len(train) == rows and train.item_num == 51


def test_equal_tokens_of_the_two_domains_stay_apart(tiny_pair, tiny_config, atomic, tmp_path):
    atomic.write(tmp_path, "src", [(u, i.replace("si", "i"), r, t)
                                   for u, i, r, t in tiny_pair.source_rows])
    atomic.write(tmp_path, "tgt", [(u, i.replace("ti", "i"), r, t)
                                   for u, i, r, t in tiny_pair.target_rows])
    dataset, (train, *_) = build(tiny_config("BPR", data_path=tmp_path, overlap_ratio=0.5))
    merged = merged_view(train, True)
    items, users = (merged.field2id_token[field] for field in ("item_id", "user_id"))
    assert len(set(items)) == len(items) == 91
    assert len(set(users)) == len(users) == dataset.source.user_num
    assert items[merged.token2id("item_id", "source:i7")] == "source:i7"
    assert merged.token2id("item_id", "i7") == dataset.token2id("item_id", "i7")
    unlinked = sorted(set(tiny_pair.overlap) - set(dataset.vocabulary.target[1:31]))[0]
    assert merged.token2id("user_id", f"source:{unlinked}") > dataset.user_num - 1
    assert len(merged) == len(train) + len(tiny_pair.source_rows)


def test_the_merged_view_of_a_ratio_split_takes_only_source_training_rows(tiny_config):
    config = Config(config_dict=tiny_config("MF", split_protocol="ratio", domain_view="merged"))
    parts = prepare_parts(config)
    held = {row for part in (parts.valid, parts.test) for row in tokens(part.source)}
    assert held and not held & set(tokens(parts.train))
    assert set(tokens(parts.observed.source)) <= set(tokens(parts.train))


def test_ranking_models_train_on_positive_rows(tiny_config):
    parts = prepare_parts(Config(config_dict=tiny_config("BPR")))
    assert sorted(tokens(parts.train)) == sorted(row for row in tokens(parts.observed)
                                                 if row[2] >= 4)
    with pytest.raises(DataError, match=r"positive_rating: no training rating reaches 9"):
        prepare_parts(Config(config_dict=tiny_config("BPR", positive_rating=9)))


# ---- splits that come with the data -------------------------------------------------------------


def divided(rows):
    """Three parts of some rows by a rule that tests can repeat."""
    parts = [[], [], []]
    for row in rows:
        digest = hashlib.sha256("".join(row).encode()).digest()[0]
        parts[0 if digest < 180 else 1 if digest < 220 else 2].append(row)
    return parts


@pytest.fixture
def benchmark_data(tiny_pair, atomic, tmp_path):
    """``tgt`` by files and by ``x_label``, ``src`` as it is."""
    parts = divided(tiny_pair.target_rows)
    atomic.write(tmp_path, "src", tiny_pair.source_rows)
    for name, rows in zip(("train", "valid", "test"), parts, strict=True):
        path = atomic.write(tmp_path, "tgt", rows)
        path.rename(path.with_name(f"tgt.{name}.inter"))
    labelled = [(*row, code) for code, rows in enumerate(parts) for row in rows]
    labelled = random.Random(0).sample(labelled, len(labelled))
    atomic.write(tmp_path, "tgt", labelled, [*atomic.header, "x_label:float"])
    return tmp_path, [sorted(numbers(rows)) for rows in parts]


FILES = {"benchmark_filename": ["train", "valid", "test"]}
LABELS = {"load_col": {"inter": ["user_id", "item_id", "rating", "timestamp", "x_label"]}}


@pytest.mark.parametrize("block", [FILES, LABELS], ids=["files", "x_label"])
def test_benchmark_splits_of_two_domains(tiny_config, tiny_pair, benchmark_data, block):
    folder, expected = benchmark_data
    dataset, parts = build(tiny_config(
        "BPR", data_path=folder, split_protocol="benchmark",
        target_domain={"dataset": "tgt", **block}))
    assert [sorted(tokens(part)) for part in parts] == expected
    assert dataset.num_overlap == 60
    assert len(parts[0].source) == len(tiny_pair.source_rows)


@pytest.mark.parametrize("block", [FILES, LABELS], ids=["files", "x_label"])
def test_benchmark_splits_of_one_domain(tiny_config, benchmark_data, block):
    folder, expected = benchmark_data
    config = tiny_config("BPR", data_path=folder, split_protocol="benchmark", dataset="tgt",
                         source_domain=None, target_domain=None, **{**LABELS, **block})
    if block is FILES:
        config["load_col"] = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    parts = create_dataset(Config(config_dict=config)).build()
    assert [sorted(tokens(part)) for part in parts] == expected


def test_benchmark_keys_that_contradict_or_lack_their_column(tiny_config, benchmark_data, atomic):
    folder, _ = benchmark_data
    with pytest.raises(DataError, match=r"cold_start_users.*benchmark_filename.*benchmark"):
        build(tiny_config("BPR", data_path=folder, target_domain={"dataset": "tgt", **FILES}))
    with pytest.raises(DataError, match=r"benchmark.*x_label"):
        build(tiny_config("BPR", data_path=folder, split_protocol="benchmark"))


@pytest.mark.parametrize("label", ["3", "-1", "0.5"])
def test_labels_that_mean_nothing_are_refused(tiny_config, tiny_pair, atomic, tmp_path, label):
    rows = [(*row, "0") for row in tiny_pair.target_rows]
    rows[5] = (*rows[5][:4], label)
    atomic.write(tmp_path, "src", tiny_pair.source_rows)
    atomic.write(tmp_path, "tgt", rows, [*atomic.header, "x_label:float"])
    with pytest.raises(DataError, match=rf"x_label is {label} in 1 rows"):
        build(tiny_config("BPR", data_path=tmp_path, split_protocol="benchmark",
                          target_domain={"dataset": "tgt", **LABELS}))


def test_real_data_load_whole(real_pair):
    config = Config("BPR", "ml1m-pair", config_dict={"data_path": str(real_pair)})
    dataset = CrossDomainDataset(config)
    for part, name in ((dataset, "ml1m-action"), (dataset.source, "ml1m-drama")):
        lines = (real_pair / name / f"{name}.inter").read_bytes().count(b"\n")
        assert len(part.inter_feat) in (lines, lines - 1)
    assert dataset.num_overlap > 5000
