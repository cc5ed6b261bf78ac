"""Prepared data sets are written whole, in the order that a kill cannot spoil, and said where from."""

import hashlib
import json

import numpy as np
import polars as pl
import pytest

from dataset_prep.output import (
    checked_name,
    clean,
    is_made,
    read_record,
    start_dataset,
    write_dataset,
)
from dataset_prep.skips import Skips
from recbole_mmdiff.cli import main
from recbole_mmdiff.data.atomic import read_atomic
from recbole_mmdiff.data.features import find_modalities, write_features
from recbole_mmdiff.errors import ConfigError, DataError

INTER = pl.DataFrame({"user_id:token": ["u1", "ü2"], "item_id:token": ["a", "b"],
                      "rating:float": pl.Series([4.0, 1.5], dtype=pl.Float32),
                      "timestamp:float": [1158019200, 7]})
ITEM = pl.DataFrame({"item_id:token": ["a", "b"], "title:token_seq": ['The "Best" of', None]})


def test_written_files_are_read_back(tmp_path):
    reviews = pl.DataFrame({"user_id": ["u1"], "review": ["two\nlines\tand a tab"]})
    folder = write_dataset(tmp_path / "toy", {"inter": INTER, "item": ITEM, "reviews": reviews},
                           {"edition": "2014"})
    inter = read_atomic(folder / "toy.inter", None, {"user_id", "item_id", "rating", "timestamp"})
    assert inter.to_dict("list") == {"user_id": ["u1", "ü2"], "item_id": ["a", "b"],
                                     "rating": [4.0, 1.5], "timestamp": [1158019200.0, 7.0]}
    item = read_atomic(folder / "toy.item", None, {"item_id"})
    assert item["title"][0] == 'The "Best" of' and item["title"].isna().tolist() == [False, True]
    assert pl.read_parquet(folder / "toy.reviews.parquet").equals(reviews)
    record = read_record(folder)
    assert record["edition"] == "2014" and record["files"]["toy.inter"]["rows"] == 2
    for name, told in record["files"].items():
        assert told["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.mark.parametrize(("table", "message"), [
    (INTER.rename({"rating:float": "rating"}), "the column 'rating' has no type"),
    (INTER.rename({"rating:float": "rating:double"}), "'rating:double' has no type"),
    (INTER.with_columns(pl.lit("x\ty").alias("user_id:token")), r"2 cells of user_id:token hold a tab"),
    (INTER.with_columns(pl.lit("x\ry").alias("user_id:token")), r"cells of user_id:token"),
])
def test_what_cannot_be_read_back_is_refused_before_anything_is_written(tmp_path, table, message):
    with pytest.raises(DataError, match=message):
        write_dataset(tmp_path / "toy", {"item": ITEM, "inter": table}, {})
    assert not (tmp_path / "toy").exists()


RECIPE = {"recipe": {"k": 5}}


@pytest.mark.parametrize("stop", [1, 2])
def test_a_write_that_was_cut_off_begins_anew(tmp_path, monkeypatch, stop):
    """Also over an earlier set, of which nothing stays; .inter is not there before the rest is."""
    folder, tables = tmp_path / "toy", {"inter": INTER, "item": ITEM}
    write_dataset(folder, {**tables, "user": INTER.select("user_id:token"), "reviews": INTER}, {"recipe": 1})
    write, calls = pl.DataFrame.write_csv, []

    def killed(self, path, **options):
        calls.append(path)
        write(self, path, **options)
        if len(calls) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(pl.DataFrame, "write_csv", killed)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(folder, tables, RECIPE)
    for temporary in ("toy.0123456789ab.tmp.inter", "toy.reviews.0123456789ab.tmp.parquet",
                      "toy.prep.0123456789ab.tmp.json"):
        (folder / f".{temporary}").touch()    # as a killed process leaves them
    monkeypatch.undo()
    assert read_record(folder) is None and not is_made(folder, RECIPE["recipe"], overwrite=False)
    assert {path.name for path in folder.glob("toy*")} <= {"toy.prep.json", "toy.item"}
    write_dataset(folder, tables, RECIPE)
    assert sorted(path.name for path in folder.iterdir()) == ["toy.inter", "toy.item", "toy.prep.json"]
    assert is_made(folder, RECIPE["recipe"], overwrite=False)


def test_what_is_there_is_made_again_only_when_asked(tmp_path):
    folder = write_dataset(tmp_path / "toy", {"inter": INTER, "item": ITEM}, {"recipe": {"k": (5, 6)}})
    assert not is_made(tmp_path / "other", {}, overwrite=False)
    assert is_made(folder, {"k": (5, 6)}, overwrite=False)
    assert not is_made(folder, {"k": (5, 6)}, overwrite=True)
    with pytest.raises(DataError, match="another data set is there"):
        is_made(folder, {"k": (5, 7)}, overwrite=False)
    (folder / "toy.item").unlink()
    assert not is_made(folder, {"k": (5, 6)}, overwrite=False), "a file is gone"
    (folder / "toy.prep.json").unlink()
    with pytest.raises(DataError, match="another data set is there"):
        is_made(folder, {"k": (5, 6)}, overwrite=False)


def test_features_of_the_earlier_record_go_and_others_stay(tmp_path):
    folder, ones = tmp_path / "toy", np.ones((1, 2), np.float32)
    start_dataset(folder, {"features": {"image": 1}})
    for modality in ("image", "mine"):
        write_features(folder, "toy", modality, ["a"], ones)
    write_dataset(folder, {"inter": INTER}, {"features": {"image": 1}}, started=True)
    assert find_modalities(folder, "toy") == ["image", "mine"]
    write_dataset(folder, {"inter": INTER}, {})
    assert find_modalities(folder, "toy") == ["mine"]


@pytest.mark.parametrize("name", ["..", "", ".hidden", "-x", "a/b", "a b", "a\nb", "a\n"])
def test_names_that_are_no_names(name):
    with pytest.raises(ConfigError, match=r"--as: .* is no name of a data set"):
        checked_name(name, "--as")
    assert checked_name("amazon2014-cds_v1.2+x", "--as")


def test_a_record_that_is_no_json_is_none(tmp_path):
    folder = write_dataset(tmp_path / "toy", {"inter": INTER}, {})
    (folder / "toy.prep.json").write_text("{")
    assert read_record(folder) is None
    for other in ([1], {"files": 3}, {"files": {"../x": {}}}, {"features": {"": {}}}, {"features": [1]},
                  {"files": {"x" * 300: {}}}):
        (folder / "toy.prep.json").write_text(json.dumps(other))
        assert read_record(folder) is None
    (folder / "toy.prep.json").write_text("[" * 100_000)
    assert read_record(folder) is None


def test_clean_cells():
    cells = ["  a\t b\r\nc ", "", " \n", None, "x\u2028y\x00z", "«é»"]
    cleaned = pl.DataFrame({"text": cells}).select(clean("text"))["text"].to_list()
    assert cleaned == ["a b c", None, None, None, "x y z", "«é»"]
    assert all(len(text.splitlines()) == 1 for text in cleaned if text)


def test_skips_are_counted_by_reason_with_the_first_place():
    skips = Skips()
    skips.add("not JSON", where="f, line 3")
    skips.add("not JSON", 1000, where="f, line 9")
    skips.add("no rating", 2)
    skips.add("nothing", 0, where="nowhere")
    assert skips.total == 1003
    assert skips.as_dict() == {"not JSON": {"count": 1001, "first": "f, line 3"},
                               "no rating": {"count": 2, "first": None}}
    assert skips.lines() == ["left out 1,001: not JSON (first: f, line 3)", "left out 2: no rating"]


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_command_lists_what_it_prepares(capsys, words):
    assert main(["prepare", *words]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("amazon", "mmrec", "images", "encode", "features"))


def test_unknown_preparations_are_refused(capsys):
    assert main(["prepare", "amazn"]) == 2
    assert "did you mean 'amazon'?" in capsys.readouterr().err


def test_a_missing_package_names_its_extra(capsys, monkeypatch):
    import dataset_prep.cli

    def without(name):
        raise ModuleNotFoundError("No module named 'polars'", name="polars")

    monkeypatch.setattr(dataset_prep.cli.importlib, "import_module", without)
    assert main(["prepare", "amazon"]) == 2
    assert "pip install 'recbole-mmdiff[prep]'" in capsys.readouterr().err
