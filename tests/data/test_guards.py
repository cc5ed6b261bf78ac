"""What may not happen to held-out rows: by files, saved splits, dropped users and duplicates."""

import pytest

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.errors import DataError


def pairs(part):
    """(user, item) tokens of the rows of a part."""
    users, items = (part.field2id_token[field][part.inter_feat[field].numpy()]
                    for field in (part.uid_field, part.iid_field))
    return set(zip(users.tolist(), items.tolist(), strict=True))


@pytest.fixture
def files(make_tiny_pair, tmp_path, atomic):
    """The target domain in three files, every fifth row for validation, every sixth for test."""
    pair = make_tiny_pair(tmp_path)
    rows = atomic.read(tmp_path / "tgt" / "tgt.inter")
    cut = {"train": [], "valid": [], "test": []}
    for number, row in enumerate(rows):
        cut["valid" if number % 5 == 0 else "test" if number % 6 == 0 else "train"].append(row)
    for name, part in cut.items():
        atomic.write(tmp_path, "tgt", part).rename(tmp_path / "tgt" / f"tgt.{name}.inter")
    return pair, cut


def benchmark(tiny_config, folder, **keys):
    return Config(config_dict=tiny_config(
        "BPR", data_path=str(folder), split_protocol="benchmark", positive_rating=0.0,
        target_domain={"dataset": "tgt", "benchmark_filename": ["train", "valid", "test"]}, **keys))


def test_dropped_users_leave_every_row_in_its_file(files, tiny_config, tmp_path):
    pair, cut = files
    parts = prepare_parts(benchmark(tiny_config, tmp_path, overlap_ratio=0.5, overlap_mode="split"))
    kept = {user for part in (parts.observed, parts.valid, parts.test) for user, _ in pairs(part)}
    assert 0 < len(kept) < len(pair.overlap + pair.target_only)
    for name, part in (("train", parts.observed), ("valid", parts.valid), ("test", parts.test)):
        assert pairs(part) == {row[:2] for row in cut[name] if row[0] in kept}


def test_a_row_in_two_files_is_refused(files, tiny_config, tmp_path, atomic):
    _, cut = files
    atomic.write(tmp_path, "tgt", cut["train"] + cut["test"][:3]).rename(
        tmp_path / "tgt" / "tgt.train.inter")
    with pytest.raises(DataError, match=r"stand twice in the files of benchmark_filename \(3"):
        prepare_parts(benchmark(tiny_config, tmp_path))


def test_a_split_of_fewer_rows_is_refused(tiny_config, tmp_path):
    few = Config(config_dict=tiny_config("BPR", val_interval={"rating": "[4,5]"}))
    prepare_parts(few).observed.saved_split.save(tmp_path / "split.npz")
    more = Config(config_dict=tiny_config("BPR", split_file=str(tmp_path / "split.npz")))
    with pytest.raises(DataError, match="users have target training rows; a split_file must come"):
        prepare_parts(more)


def test_users_without_interactions_are_not_linked(make_tiny_pair, tiny_config, tmp_path, atomic):
    pair = make_tiny_pair(tmp_path)
    header = ["user_id:token", "age:float"]
    everybody = sorted(pair.overlap + pair.target_only + pair.source_only)
    atomic.write(tmp_path, "tgt", [(user, "30") for user in everybody], header).rename(
        tmp_path / "tgt" / "tgt.user")
    make_tiny_pair(tmp_path)    # writes the interactions again
    columns = {"inter": ["user_id", "item_id", "rating", "timestamp"], "user": ["user_id", "age"]}
    parts = prepare_parts(Config(config_dict=tiny_config(
        "BPR", data_path=str(tmp_path), load_col=columns)))
    assert parts.observed.num_overlap == len(pair.overlap)


@pytest.mark.parametrize(("model", "view"), [("DiffCDR", "merged"), ("Bias", "merged"),
                                             ("CMF", "target")])
def test_a_view_that_the_model_cannot_use_is_refused(tiny_config, model, view):
    with pytest.raises(ValueError, match=f"domain_view: '{view}'"):
        prepare_parts(Config(config_dict=tiny_config(model, domain_view=view)))


@pytest.mark.parametrize("model", ["DiffCDR", "Bias", "CMF"])
def test_a_source_without_ratings_is_named(make_tiny_pair, tiny_config, tmp_path, model, atomic):
    make_tiny_pair(tmp_path)
    rows = [row[:2] for row in atomic.read(tmp_path / "src" / "src.inter")]
    atomic.write(tmp_path, "src", rows, ["user_id:token", "item_id:token"])
    with pytest.raises(DataError, match=f"src: {model} learns ratings, but the column 'rating'"):
        prepare_parts(Config(config_dict=tiny_config(model, data_path=str(tmp_path))))
