"""MMRec's prepared data sets become ours: the same rows, the same split, the same feature rows."""

import csv
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running import SINGLE, run_keys

from dataset_prep.mmrec import import_mmrec
from dataset_prep.output import read_record
from dataset_prep.presets import PRESETS, Domain
from recbole_mmdiff.cli import main
from recbole_mmdiff.data.features import FeatureFile, find_modalities
from recbole_mmdiff.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
HEADER = ("userID", "itemID", "rating", "timestamp", "x_label")
USERS, ITEMS, ROWS = 60, 30, 33    # three items of the features are never interacted with


def interactions(seed=5):
    """(user, item, rating, time, label) as numbers: every user has 10 items, 8:1:1."""
    draw = np.random.default_rng(seed)
    rows = []
    for user in range(USERS):
        chosen = {user % ITEMS, *draw.permutation(ITEMS)[:9].tolist()}
        for place, item in enumerate(sorted(chosen)):
            label = {0: 1, 1: 2}.get(place, 0)
            rows.append((user, item, int(draw.integers(1, 6)), 1_300_000_000 + len(rows), label))
    return [rows[k] for k in draw.permutation(len(rows))]


def write_inter(folder, rows, header=HEADER, name="toy"):
    lines = ["\t".join(map(str, row)) for row in (header, *rows)]
    (folder / f"{name}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def raw(tmp_path):
    """A folder as MMRec has it."""
    folder = tmp_path / "mmrec"
    folder.mkdir()
    write_inter(folder, interactions())
    draw = np.random.default_rng(1)
    np.save(folder / "image_feat.npy", draw.normal(size=(ROWS, 16)))
    np.save(folder / "text_feat.npy", draw.normal(size=(ROWS, 6)).astype(np.float32))
    return folder


@pytest.fixture
def imported(raw, tmp_path):
    """``imported(**options)``: what the import gives back."""
    def run(**options):
        return import_mmrec(raw, "toy", tmp_path / "dataset", **options)

    return run


def read_inter(folder):
    with open(folder / f"{folder.name}.inter", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_rows_and_labels_are_the_same(imported):
    folder = imported().folder
    found = [(int(row["user_id:token"]), int(row["item_id:token"]), float(row["rating:float"]),
              float(row["timestamp:float"]), int(row["x_label:float"])) for row in read_inter(folder)]
    assert found == interactions()


def test_features_are_the_same_by_token(imported, raw):
    folder = imported().folder
    assert find_modalities(folder, "toy") == ["image", "text"]
    for modality in ("image", "text"):
        file = FeatureFile.open(folder, "toy", modality)
        file.verify()
        given = np.load(raw / f"{modality}_feat.npy")
        assert file.tokens == tuple(map(str, range(ROWS))) and file.matrix.dtype == np.float32
        aligned = file.align(["[PAD]", "7", "0", "31"])
        np.testing.assert_array_equal(aligned.matrix[1:], given[[7, 0, 31]].astype(np.float32))
        assert file.manifest["source"] == f"{modality}_feat.npy"


def test_statistics_and_record(imported):
    done = imported()
    rows = interactions()
    parts = {part: sum(row[4] == label for row in rows)
             for part, label in (("train", 0), ("valid", 1), ("test", 2))}
    text = "\n".join(done.lines())
    assert f"sparsity {1 - len(rows) / (USERS * ITEMS):.2%}" in text
    assert f"feature image: {ROWS} items x 16; 3 of them have no interactions" in text
    record = json.loads((done.folder / "toy.prep.json").read_text(encoding="utf-8"))
    assert record == done.record and not done.there
    assert record["counts"] == {"users": USERS, "items": ITEMS, "ratings": len(rows)}
    assert record["parts"] == parts
    assert record["features"] == {"image": ROWS, "text": ROWS} and record["dims"] == {"image": 16, "text": 6}
    assert record["files"]["toy.inter"]["rows"] == len(rows)
    assert set(record["recipe"]["inputs"]) == {"toy.inter", "image_feat.npy", "text_feat.npy"}


def test_a_general_model_trains_on_it(imported, tiny_config, tmp_path):
    done = imported(new_name="mine")
    keys = {**SINGLE, "dataset": "mine", "data_path": done.folder.parent, "split_protocol": "benchmark",
            "load_col": {"inter": ["user_id", "item_id", "x_label"]}}
    finished = run_keys(tiny_config("BPR", **keys), tmp_path / "run")
    assert [len(part) for part in (finished.parts.train, finished.parts.valid, finished.parts.test)] \
        == list(done.record["parts"].values())
    assert 0 < finished.metrics["test"]["ranking_full"]["ndcg@10"] <= 1


@pytest.mark.parametrize("dropped", [("rating",), ("timestamp",), ("rating", "timestamp")])
def test_columns_in_any_order_and_some_absent(raw, imported, dropped):
    order = [name for name in ("x_label", "timestamp", "itemID", "rating", "userID") if name not in dropped]
    rows = [[row[HEADER.index(name)] for name in order] + ["more"] for row in interactions()]
    write_inter(raw, rows, [*order, "unknown"])
    found = read_inter(imported().folder)
    expected = [f"{ours}:float" for ours in ("rating", "timestamp", "x_label") if ours not in dropped]
    assert list(found[0]) == ["user_id:token", "item_id:token", *expected]
    assert [(int(row["user_id:token"]), int(row["x_label:float"])) for row in found] \
        == [(row[0], row[4]) for row in interactions()]


def test_windows_lines_are_read(raw, imported):
    path = raw / "toy.inter"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(read_inter(imported().folder)) == len(interactions())


def test_the_first_of_equal_pairs_is_kept(raw, imported):
    rows = interactions()
    again = [(*rows[3][:2], 1, 7, 2), (*rows[3][:2], 2, 8, 1), (*rows[9][:2], 3, 9, 0)]
    write_inter(raw, [*rows, *again])
    done = imported()
    assert [int(row["x_label:float"]) for row in read_inter(done.folder)] == [row[4] for row in rows]
    (entry,) = done.record["left_out"].values()
    assert entry == {"count": 3, "first": f"toy.inter, line {len(rows) + 2}"}
    assert "left out 3" in done.lines()[-1]


def write_mappings(raw, items=ROWS):
    lines = [f"B{k:03}\t{k}" for k in reversed(range(items))]
    (raw / "i_id_mapping.csv").write_text("asin\titemID\n" + "\n".join(lines) + "\n", encoding="utf-8")
    lines = [f"{k}\tA{k:03}" for k in range(USERS)]
    (raw / "u_id_mapping.csv").write_text("userID\treviewerID\n" + "\n".join(lines) + "\n", encoding="utf-8")


def test_original_names(raw, imported):
    write_mappings(raw)
    folder = imported(tokens="asin").folder
    assert [(row["user_id:token"], row["item_id:token"]) for row in read_inter(folder)] \
        == [(f"A{row[0]:03}", f"B{row[1]:03}") for row in interactions()]
    assert FeatureFile.open(folder, "toy", "text").tokens == tuple(f"B{k:03}" for k in range(ROWS))
    (raw / "u_id_mapping.csv").unlink()
    folder = imported(tokens="asin", overwrite=True).folder
    assert read_inter(folder)[0]["user_id:token"] == str(interactions()[0][0])


def test_names_that_do_not_fit(raw, imported):
    with pytest.raises(DataError, match=r"i_id_mapping\.csv: there is no such file"):
        imported(tokens="asin")
    write_mappings(raw, items=ROWS - 1)
    with pytest.raises(DataError, match=rf"i_id_mapping\.csv: has no name for 1 ids, first {ROWS - 1}"):
        imported(tokens="asin")
    for text, message in (("asin\titemID\nB1\t0\nB1\t1\n", "line 3: asin is 'B1'"),
                          ("asin\titemID\nB1\t0\nB2\tx\n", "line 3: itemID is 'x'"),
                          ("asin\titemID\nB1\t0\nB\r2\t1\n", r"line 3: asin is 'B\\r2'.*breaks its line"),
                          ("asin\tid\nB1\t0\n", "line 1: the columns are")):
        (raw / "i_id_mapping.csv").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            imported(tokens="asin")
    with pytest.raises(ConfigError, match="--tokens"):
        imported(tokens="names")


def with_cell(column, value, row=4):
    rows = [list(row) for row in interactions()]
    rows[row][HEADER.index(column)] = value
    return rows


@pytest.mark.parametrize(("column", "value", "message"), [
    ("x_label", "3", r"line 6: x_label is '3'.*0 \(train\)"), ("x_label", "", "line 6: x_label is ''"),
    ("x_label", "0.5", "line 6: x_label is '0.5'"), ("userID", "A1", "line 6: userID is 'A1'.*whole number"),
    ("itemID", "1.5", "line 6: itemID is '1.5'"), ("itemID", "-1", "line 6: itemID is '-1'"),
    ("itemID", str(10**20), "line 6: itemID is '1000"), ("rating", "good", "line 6: rating is 'good'"),
    ("rating", "nan", "line 6: rating is 'nan'"), ("timestamp", "", "line 6: timestamp is ''"),
    ("itemID", ROWS, rf"_feat\.npy: has {ROWS} rows, but toy\.inter has the itemID {ROWS}"),
    ("rating", "5\t5", "line 6 has 6 fields, the header has 5"),
])
def test_bad_cells(raw, imported, tmp_path, column, value, message):
    write_inter(raw, with_cell(column, value))
    with pytest.raises(DataError, match=message):
        imported()
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(("content", "message"), [
    (b"", "empty"), (b"userID\titemID\tx_label\n", "no rows"),
    (b"userID,itemID,x_label\n0,0,0\n", "line 1: there is no column 'userID'"),
    (b"userID\titemID\trating\n0\t0\t5\n", "line 1: there is no column 'x_label'"),
    (b"userID\titemID\tx_label\n\xff\t0\t0\n", "UTF-8"),
])
def test_bad_tables(raw, imported, content, message):
    (raw / "toy.inter").write_bytes(content)
    with pytest.raises(DataError, match=message):
        imported()


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("unpickled.txt", "w")


def test_pickled_features_are_never_unpickled(raw, imported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(raw / "text_feat.npy", np.array([Evil()] * ROWS, dtype=object))
    with pytest.raises(DataError, match=r"text_feat\.npy: not a complete \.npy"):
        imported()
    (raw / "text_feat.npy").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match=r"text_feat\.npy: not a complete \.npy"):
        imported()
    assert not (tmp_path / "unpickled.txt").exists() and not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(("value", "message"), [
    (np.zeros((ROWS, 2, 2)), "shape"), (np.zeros(ROWS), "shape"), (np.zeros((ROWS, 2), dtype=int), "int64"),
    (np.zeros((ROWS, 0)), "shape"), (np.zeros((ITEMS - 1, 2)), f"has {ITEMS - 1} rows"),
    (np.full((ROWS, 2), np.nan), r"image_feat\.npy.*'0' holds NaN or Inf"),
    (np.full((ROWS, 2), 1e300), r"image_feat\.npy.*'0' holds NaN or Inf"),
])
def test_bad_features(raw, imported, tmp_path, value, message):
    np.save(raw / "image_feat.npy", value)
    with pytest.raises(DataError, match=message):
        imported()
    assert not (tmp_path / "dataset").exists()


def test_a_feature_with_no_usable_name(raw, imported, tmp_path):
    shutil.copy(raw / "text_feat.npy", raw / "a.b_feat.npy")
    with pytest.raises(DataError, match=r"'a\.b' is not a usable name"):
        imported()
    assert not (tmp_path / "dataset").exists()


def test_truncated_features(raw, imported):
    content = (raw / "image_feat.npy").read_bytes()
    (raw / "image_feat.npy").write_bytes(content[:-8])
    with pytest.raises(DataError, match=r"image_feat\.npy: not a complete \.npy"):
        imported()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("broken", ["image_feat.npy", "text_feat.npy", "toy.inter"])
def test_a_failed_import_leaves_an_earlier_one_as_it_was(raw, imported, broken):
    """All files are new, one of them is broken: none of the old ones is touched."""
    folder = imported().folder
    before = contents(folder)
    write_inter(raw, interactions(seed=6))
    for modality, dim in (("image", 16), ("text", 6)):
        np.save(raw / f"{modality}_feat.npy", np.ones((ROWS, dim), dtype=np.float32))
    if broken == "toy.inter":
        write_inter(raw, with_cell("x_label", "3"))
    else:
        np.save(raw / broken, np.full((ROWS, 6), np.nan, dtype=np.float32))
    with pytest.raises(DataError, match=r"NaN or Inf|x_label is '3'"):
        imported(overwrite=True)
    assert contents(folder) == before


def test_the_same_import_writes_nothing_again(imported):
    first = imported()
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    again = imported()
    assert again.there and again.record == first.record
    assert again.lines()[0].endswith("there already, made of the same files")
    assert again.lines()[1:] == first.lines()
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times


def test_files_that_are_gone_are_made_again(imported):
    folder = imported().folder
    before = contents(folder)
    for name in ("toy.inter", "toy.text.npy", "toy.image.json"):
        (folder / name).unlink()
        assert not imported().there
        assert contents(folder) == before


def test_another_data_set_is_replaced_only_when_asked(raw, imported, tmp_path):
    folder = tmp_path / "dataset" / "toy"
    folder.mkdir(parents=True)
    (folder / "toy.inter").write_text("user_id:token\titem_id:token\na\tb\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"another data set is there.*--overwrite"):
        imported()
    assert len(read_inter(folder)) == 1
    imported(overwrite=True)
    (raw / "text_feat.npy").unlink()
    with pytest.raises(DataError, match="another data set is there"):
        imported()
    assert find_modalities(folder, "toy") == ["image", "text"]
    imported(overwrite=True)
    # Nothing of the earlier import stays behind to be taken for a part of this one.
    assert sorted(contents(folder)) == ["toy.image.json", "toy.image.npy", "toy.image.tokens", "toy.inter",
                                        "toy.prep.json"]


KILLED = """
import os, signal, sys
from dataset_prep import mmrec, output
module, function, before = {place}
true, left = getattr(module, function), [before]
def killed(*arguments, **options):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return true(*arguments, **options)
setattr(module, function, killed)
mmrec.import_mmrec(sys.argv[1], "toy", sys.argv[2])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize("place", ["mmrec, 'write_features', 1", "output, '_check_cells', 0",
                                   "output, 'sha256', 0", "output, 'write_json', 1"])
def test_the_same_command_makes_good_a_killed_one(raw, imported, tmp_path, place):
    """Killed before the second feature, and before the interactions, their checksum and the record."""
    run = subprocess.run([sys.executable, "-c", KILLED.format(place=place), raw, tmp_path / "dataset"],
                         cwd=ROOT, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == -signal.SIGKILL
    folder = tmp_path / "dataset" / "toy"
    assert (folder / "toy.prep.json").exists() and read_record(folder) is None
    (folder / ".toy.0123456789ab.tmp.inter").write_text("half a line", encoding="utf-8")
    assert not imported().there
    again = contents(folder)
    imported(overwrite=True)
    assert contents(folder) == again and not [name for name in again if ".tmp" in name]


def test_the_source_is_not_overwritten(raw):
    before = (raw / "toy.inter").read_bytes()
    folder = raw.rename(raw.with_name("toy"))
    with pytest.raises(DataError, match="would be overwritten"):
        import_mmrec(folder, "toy", folder.parent)
    assert (folder / "toy.inter").read_bytes() == before
    assert import_mmrec(folder, "toy", folder.parent, "other").folder == folder.parent / "other"


def test_half_precision_stays(raw, imported):
    np.save(raw / "text_feat.npy", np.ones((ROWS, 4), dtype=np.float16))
    assert FeatureFile.open(imported().folder, "toy", "text").matrix.dtype == np.float16


def test_command(raw, tmp_path, capsys):
    for path in raw.glob("*_feat.npy"):
        path.unlink()
    (raw / "toy.inter").rename(raw / "baby.inter")
    words = ["prepare", "mmrec", f"--folder={raw}", "--name=baby", f"--output={tmp_path / 'out'}", "--as=b"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "warning: there is no <modality>_feat.npy" in out
    assert "CCDRec, Table 1: 19,445 users, 7,050 items, 160,792 ratings, which differs" in out
    assert "ranking models train on it with --dataset=b" in out and "--split_protocol=benchmark" in out
    assert (tmp_path / "out" / "b" / "b.inter").is_file()
    assert main([*words, "--tokens=ids"]) == 0 and "there already" in capsys.readouterr().out
    write_inter(raw, interactions(seed=6), name="baby")
    assert main(words) == 2 and "another data set is there" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0 and "there already" not in capsys.readouterr().out
    assert main(["prepare", "mmrec", f"--folder={raw}", "--name=absent"]) == 2
    assert "absent.inter: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["..", ".", "", "../b", "a b", "a\nb", ".b", "-b", "/tmp/b"])
def test_names_that_would_leave_the_output(raw, tmp_path, capsys, name):
    words = ["prepare", "mmrec", f"--folder={raw}", f"--output={tmp_path / 'out'}"]
    for option, more in (("--as", ["--name=toy"]), ("--name", [])):
        assert main([*words, *more, f"{option}={name}"]) == 2
        assert f"{option}: {name!r} is no name of a data set" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_published_statistics_are_compared(raw, tmp_path, capsys, monkeypatch):
    """A paper with a data set of our counts."""
    published = {"users": USERS, "items": ITEMS, "ratings": len(interactions())}
    preset = replace(PRESETS["ccdrec-baby"], domains=(Domain("toy", "Toys", published),))
    monkeypatch.setitem(PRESETS, "ccdrec-toy", preset)
    assert main(["prepare", "mmrec", f"--folder={raw}", "--name=toy", f"--output={tmp_path / 'out'}"]) == 0
    assert f"{USERS} users, {ITEMS} items, {len(interactions())} ratings, the same" in capsys.readouterr().out
