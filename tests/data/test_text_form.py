"""Features in RecBole's text form: converted once, again when they change, refused with the line."""

import json
import os

import numpy as np
import pytest

from recbole_mmdiff.cli import main
from recbole_mmdiff.data.features import FeatureError, FeatureFile, find_modalities, write_features

HEADER = "item_id:token\temb:float_seq\n"
ROWS = "b\t1 -2.5 3e-2\na\t0 0.1 7\né x\t1 1 1\n"
VALUES = [[1, -2.5, 0.03], [0, 0.1, 7], [1, 1, 1]]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "toy" / "toy.plot"
    path.parent.mkdir()
    path.write_text(HEADER + ROWS, encoding="utf-8")
    return path


def opened(text):
    return FeatureFile.open(text.parent, "toy", "plot")


def no_conversion(monkeypatch):
    def fail(path):
        raise AssertionError("converted again")

    monkeypatch.setattr("recbole_mmdiff.data.features.read_text_form", fail)


def test_converted_once(text, monkeypatch):
    feature = opened(text)
    feature.verify()
    assert feature.tokens == ("b", "a", "é x")
    np.testing.assert_array_equal(feature.matrix, np.array(VALUES, dtype=np.float32))
    assert feature.manifest["text_form"]["file"] == "toy.plot"
    no_conversion(monkeypatch)
    opened(text)
    os.utime(text, ns=(1, 1))   # a copy: another time, the same bytes
    opened(text)


def test_blank_lines_are_passed_over(text):
    text.write_text(HEADER + "a\t1 2\n\nb\t3 4\n \n")
    np.testing.assert_array_equal(opened(text).matrix, [[1, 2], [3, 4]])


def test_columns_in_the_other_order(text):
    text.write_text("emb:float_seq\titem_id:token\n1 2\tx\n3 4\ty\n")
    assert opened(text).tokens == ("x", "y")
    np.testing.assert_array_equal(opened(text).matrix, [[1, 2], [3, 4]])


def test_many_blocks_of_lines(text, monkeypatch):
    monkeypatch.setattr("recbole_mmdiff.data.text_form._LINES", 2)
    text.write_text("id:token\te:float_seq\n" + "".join(f"t{i}\t{i} {i + 1}\n" for i in range(7)))
    np.testing.assert_array_equal(opened(text).matrix, [[i, i + 1] for i in range(7)])


def test_a_changed_file_is_converted_again(text):
    opened(text)
    text.write_text(HEADER + "b\t5 6\n")
    assert opened(text).tokens == ("b",)
    same_size = text.read_text().replace("5 6", "7 6")
    text.write_text(same_size)
    os.utime(text, ns=(5, 5))
    np.testing.assert_array_equal(opened(text).matrix, [[7, 6]])


def test_a_triple_made_otherwise_goes_first(text):
    write_features(text.parent, "toy", "plot", ["z"], np.ones((1, 2), np.float32), encoder="mine")
    assert opened(text).tokens == ("z",)


def test_it_is_found_and_checked_by_the_command(text, capsys):
    (text.parent / "toy.inter").write_text("user_id:token\titem_id:token\n1\tb\n")
    (text.parent / "toy.notes").write_text("plain words\n")
    assert find_modalities(text.parent, "toy") == ["plot"]
    assert main(["prepare", "features", f"--data={text.parent}"]) == 0
    assert "toy.plot.npy: 3 items x 3 float32, checksum and values are right" in capsys.readouterr().out
    matrix = text.with_name("toy.plot.npy")
    content = bytearray(matrix.read_bytes())
    content[-1] ^= 1
    matrix.write_bytes(content)
    assert main(["prepare", "features", f"--data={text.parent}"]) == 2
    assert "sha256 is" in capsys.readouterr().err
    assert main(["prepare", "features", f"--data={text.parent / 'no'}"]) == 2
    assert "holds no features" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), [
    ("item_id:token\temb:float\n" + ROWS, r"toy.plot, line 1: the header is .*two columns"),
    ("a\t1 2\n", "line 1: the header"),
    ("", "line 1: the header"),
    (HEADER, "a header but no rows"),
    (HEADER + "a\t1 2\nb\t1\n", "line 3: holds 1 numbers, the lines before it 2"),
    (HEADER + "a\t1 2\nb 1 2\n", "line 3: 'b 1 2"),
    (HEADER + "a\t1 2\nb\t\n", "line 3: "),
    (HEADER + "a\t1 2\n\nb\t1\n", "line 4: holds 1 numbers"),
    (HEADER + "a\t1 2\nb\t1 two\n", "line 3: .*'two'"),
    (HEADER + "a\t1 2\nb\t1 nan\n", "toy.plot, line 3: holds NaN"),
    (HEADER + "a\t1 2\nb\t1 1e39\n", "line 3: holds .* too large"),
    (HEADER + "a\t1 2\nb\t1 2\na\t1 2\n", "line 4: the token 'a' stands on line 2 already"),
])
def test_bad_text_is_refused_and_leaves_nothing(text, content, message):
    text.write_text(content)
    with pytest.raises(FeatureError, match=message):
        opened(text)
    assert {path.name for path in text.parent.iterdir() if not path.name.startswith(".")} == {"toy.plot"}


@pytest.mark.parametrize(("column", "entity"), [("item_id", "item"), ("iid", "item"), ("uid", "user"),
                                                ("user_id", "user"), ("ent_id", None)])
def test_the_header_tells_whose_features_they_are(text, column, entity):
    text.write_text(f"emb:float_seq\t{column}:token\n1 2\tx\n")
    assert opened(text).entity == entity


def test_the_command_goes_through_all(text, capsys, monkeypatch):
    for name in ("good", "cut"):
        write_features(text.parent, "toy", name, ["z"], np.ones((1, 2), np.float32))
    text.with_name("toy.cut.json").unlink()
    text.write_text(HEADER + "a\t1 nan\n")
    monkeypatch.chdir(text.parent)
    assert main(["prepare", "features", "--data=."]) == 2
    told = capsys.readouterr()
    assert "toy.good.npy: 1 items" in told.out
    assert "2 of 3 features cannot be used" in told.err
    assert "toy.plot, line 2" in told.err and "lacks toy.cut.json" in told.err


def test_other_encodings_are_refused(text):
    text.write_bytes(HEADER.encode() + "ä\t1 2\n".encode("latin-1"))
    with pytest.raises(FeatureError, match="not UTF-8"):
        opened(text)


def test_a_folder_that_cannot_be_written(text, monkeypatch):
    def refused(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr("recbole_mmdiff.data.features.write_features", refused)
    with pytest.raises(FeatureError, match=r"cannot be converted beside itself .*read-only.*copy"):
        opened(text)


def test_an_interrupted_conversion_is_made_again(text):
    opened(text)
    meta = text.with_name("toy.plot.json")
    assert json.loads(meta.read_text())["rows"] == 3
    meta.unlink()
    opened(text).verify()
