"""Reading atomic files: what is kept as it is, and which faults are named."""

import csv
import random

import numpy as np
import pytest

from recbole_mmdiff.data.atomic import read_atomic, read_header
from recbole_mmdiff.errors import DataError

HEADER = "user_id:token\titem_id:token\trating:float\ttitle:token_seq"
IDS = {"user_id", "item_id", "rating"}


@pytest.fixture
def write(tmp_path):
    def to_file(text, encoding="utf-8"):
        path = tmp_path / "d.inter"
        path.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
        return path

    return to_file


def table(*lines, header=HEADER):
    return "\n".join([header, *lines]) + "\n"


def test_a_file_is_what_the_csv_module_reads(write):
    draw = random.Random(0)
    words = ["NA", "null", "nan", "None", "007", "1e5", "True", '"quoted', "it's", "ü", "a b", "#1",
             "N/A", "-", "#N/A", "1.0"]
    lines = ["\t".join([draw.choice(words), draw.choice(words), repr(draw.random() * 5),
                        draw.choice(words)]) for _ in range(300)]
    path = write(table(*lines))
    frame = read_atomic(path, None, IDS, categories=("user_id",))
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    assert [tuple(row) for row in zip(frame["user_id"], frame["item_id"], frame["title"],
                                      strict=True)] == [(r[0], r[1], r[3]) for r in rows]
    assert frame["rating"].tolist() == [float(row[2]) for row in rows]
    assert frame["rating"].dtype == np.float64


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False], ids=["newline at the end", "none"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_line_ends_and_byte_order_marks(write, end, last, mark):
    path = write(mark + end.join([HEADER, "u\ti\t4\ta title", "v\tj\t2\tother"]) + end * last)
    frame = read_atomic(path, None, IDS)
    assert frame.to_dict("list") == {"user_id": ["u", "v"], "item_id": ["i", "j"],
                                     "rating": [4.0, 2.0], "title": ["a title", "other"]}
    assert read_header(path, "\t", "utf-8")[0].name == "user_id"


@pytest.mark.parametrize(("encoding", "separator"), [("latin-1", "\t"), ("utf-16", "\t"),
                                                     ("utf-8", ","), ("utf-8", "é")])
def test_other_encodings_and_separators(write, encoding, separator):
    text = table("u\ti\t4\tcafé" if separator != "é" else "u\ti\t4\tcafe", "v\tj\t2\t")
    path = write(text.replace("\t", separator), encoding)
    frame = read_atomic(path, None, IDS, separator, encoding)
    assert frame["title"].tolist()[0] in ("café", "cafe")
    assert frame["rating"].tolist() == [4, 2]
    path = write(table("u\ti\t4\tx", "v\tj\t2").replace("\t", separator), encoding)
    with pytest.raises(DataError, match="line 3: has 3 fields, the header has 4"):
        read_atomic(path, None, IDS, separator, encoding)


@pytest.mark.parametrize("tokens", [["007", "7", "08"], ["1", "1.0", "01"], ["True", "true"], ["1e5", "-0"]])
def test_categories_are_the_tokens_as_they_stand_there(write, tokens):
    """Also where all of them look like numbers: "7" and "007" are two users."""
    frame = read_atomic(write(table(*[f"{token}\t{token}\t4\tx" for token in tokens])), None, IDS,
                        categories=("user_id", "item_id"))
    for name in ("user_id", "item_id"):
        assert frame[name].tolist() == tokens and sorted(frame[name].cat.categories) == sorted(tokens)


def test_only_wanted_columns_come(write):
    frame = read_atomic(write(table("u\ti\t4\tx")), {"user_id", "item_id"}, {"user_id", "item_id"})
    assert list(frame) == ["user_id", "item_id"]


def test_an_empty_optional_cell_is_missing_and_other_words_are_not(write):
    frame = read_atomic(write(table("u\ti\t4\t", "v\tj\t2\tNaN")), None, IDS)
    assert frame["title"].isna().tolist() == [True, False]


def test_strange_line_separators_belong_to_the_cell(write):
    """U+2028 and others end a line for Python, not for an atomic file."""
    titles = ["a\u2028b", "c\x0bd", "e\x85f", "g\x1ch"]
    path = write(table(*[f"u{n}\ti\t3\t{title}" for n, title in enumerate(titles)]))
    assert read_atomic(path, None, IDS)["title"].tolist() == titles
    path = write(table(*[f"u{n}\ti\t3\t{title}" for n, title in enumerate(titles)], "u\ti\t3"))
    with pytest.raises(DataError, match="line 6: has 3 fields"):
        read_atomic(path, None, IDS)


@pytest.mark.parametrize(("lines", "message"), [
    (["u\ti\t4\tx", "v\tj\t2"], r"line 3: has 3 fields, the header has 4; the line is 'v\\tj\\t2'"),
    (["u\ti\t4\tx\ty", "v\tj\t2\tx"], "line 2: has 5 fields, the header has 4"),
    (["u\ti\t4\tx", "v\tj\t2", "w\tk\t2\tx\ty"], "line 3: has 3 fields"),
    (["u\ti\t4\tx", "w\tk\t2\tx\ty", "v\tj\t2"], "line 3: has 5 fields"),
    (["u\ti\tfour\tx"], "line 2: rating is 'four', which is not a number"),
    (["u\ti\t4\tx", "v\tj\tnan\tx"], "line 3: rating is 'nan', which is not a number"),
    (["u\ti\t4\tx", "v\tj\t\tx"], "line 3: rating is empty"),
    (["u\ti\tinf\tx"], "line 2: rating is inf"),
    (["u\ti\t4\tx", "v\tj\t-inf\tx"], "line 3: rating is -inf"),
    (["u\ti\t4\tx", "\tj\t3\tx"], "line 3: user_id is empty"),
    (["u\t\t4\tx"], "line 2: item_id is empty"),
    ([], "holds a header but no rows"),
    (["u\ti\t4\tx", "", "", "v\tj\tfive\tx"], "line 5: rating is 'five'"),
    (["", "u\ti\t4\tx", "v\tj\t\tx"], "line 4: rating is empty"),
    (["u\ti\t4\tx\ry", "v\tj\t3\tx"], "carriage return"),
    (["u\ti\tfour\tx\ry", "v\tj\t3\tx"], "carriage return"),
])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
def test_faults_are_named_with_their_line(write, lines, message, end):
    path = write(table(*lines).replace("\n", end))
    with pytest.raises(DataError, match=rf"d\.inter(, |: ).*{message}"):
        read_atomic(path, None, IDS, categories=("user_id", "item_id"))


def test_blank_lines_are_skipped(write):
    frame = read_atomic(write(table("u\ti\t4\tx", "", "v\tj\t3\ty", "", "")), None, IDS)
    assert frame["user_id"].tolist() == ["u", "v"]


@pytest.mark.parametrize(("header", "message"), [
    ("user_id:token\titem_id", "line 1: the header field 'item_id' is not 'name:type'"),
    ("user_id:token\titem_id:word", r"line 1: .*'item_id:word' is not 'name:type'.*'token'"),
    ("user_id:token\t:token", "line 1: .*':token'"),
    ("user_id:token\tuser_id:token", "line 1: a column name stands twice"),
    ("user_id:token,item_id:token", "line 1: .*'user_id:token,item_id:token'"),
    ("", "line 1: the header field ''"),
    ("user_id:token\titem_id:token\tstars:float", "line 1: there is no column 'rating', only"),
])
def test_a_malformed_header_is_named(write, header, message):
    with pytest.raises(DataError, match=rf"d\.inter, {message}"):
        read_atomic(write(header + "\n"), None, IDS)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.inter: cannot be read \(No such file"):
        read_atomic(tmp_path / "none.inter", None, IDS)


@pytest.mark.parametrize("line", ["u\ti\t4\tcafé", "u\ti\t4\tcafé\nv\tj\t3", "u\ti\tfour\tcafé"])
def test_text_of_another_encoding(write, line):
    """Also where the line is faulty besides: never an error that is not ours."""
    with pytest.raises(DataError, match=r"d\.inter.*(set the key 'encoding'|line \d)"):
        read_atomic(write(table(line), "latin-1"), None, IDS)


def test_an_unknown_encoding(write):
    with pytest.raises(DataError, match=r"d\.inter.*utf-88.*encoding"):
        read_atomic(write(table("u\ti\t4\tx")), None, IDS, encoding="utf-88")
