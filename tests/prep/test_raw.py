"""Reading raw files: every sound line, and each bad one counted with its place, against json line by line."""

import gzip
import hashlib
import itertools
import json
import random

import polars as pl
import pytest

from dataset_prep import raw as module
from dataset_prep import reviews
from dataset_prep.editions import EDITIONS
from dataset_prep.raw import RawFile, first_line
from dataset_prep.reviews import CsvRatings, JsonReviews, read_rows
from recbole_mmdiff.errors import DataError

NAMES = EDITIONS["2014"].reviews


def review(number, **changes):
    line = {"reviewerID": f"A{number}", "asin": f"B{number % 7}", "reviewerName": 'a "b"', "helpful": [0, 1],
            "reviewText": f"naïve text {number}", "overall": float(number % 5 + 1), "summary": "s",
            "unixReviewTime": 10**9 + number}
    line.update(changes)
    return json.dumps({key: value for key, value in line.items() if value is not Ellipsis})


def write(path, lines, end="\n"):
    text = "\n".join(lines) + end
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(path, text=True, max_bad=1.0):
    raw = RawFile(path, max_bad)
    rows = pl.concat(read_rows(raw, JsonReviews(NAMES, text)))
    return raw, rows


def by_json(lines):
    """Sound rows by plain Python: number, user, item, rating, time, text."""
    found = []
    for number, line in enumerate(lines, 1):
        value = json.loads(line)
        found.append((number, value["reviewerID"], value["asin"], value["overall"], value["unixReviewTime"],
                      value["reviewText"]))
    return found


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few lines, so that their borders fall between and within lines everywhere."""
    monkeypatch.setattr(module, "CHUNK", 700)
    monkeypatch.setattr(module, "_BLOCK", 97)


@pytest.mark.parametrize("members", [0, 1, 3])
def test_plain_and_gzip_equal_json_line_by_line(tmp_path, small_chunks, members):
    lines = [review(number) for number in range(50)]
    path = write(tmp_path / "named.json", lines)      # gzip is known by its first bytes, not by its name
    content = path.read_bytes()
    if members:
        cuts = [len(content) * part // members for part in range(members + 1)]
        path.write_bytes(b"".join(gzip.compress(content[a:b])
                                  for a, b in itertools.pairwise(cuts)))
    raw, rows = read(path)
    assert rows.rows() == by_json(lines)
    assert rows.schema == {"row": pl.UInt32, "user_id": pl.String, "item_id": pl.String, "rating": pl.Float32,
                           "timestamp": pl.Int64, "review": pl.String}
    assert raw.record() == {"name": "named.json", "bytes": path.stat().st_size, "lines": 50, "not_needed": 0,
                            "left_out": {}, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


BAD = {
    "no user": (review(1, reviewerID=...), "the user is missing or no text"),
    "null user": (review(1, reviewerID=None), "the user is missing or no text"),
    "empty user": (review(1, reviewerID=""), "the user is missing or no text"),
    "boolean user": (review(1, reviewerID=True), "the user is missing or no text"),
    "list user": (review(1, reviewerID=["A"]), "the user is missing or no text"),
    "number with a point": (review(1, reviewerID=1.5), "the user is missing or no text"),
    "spaced item": (review(1, asin="B 1"), "the item holds a space or a control character"),
    "tab in item": (review(1, asin="B\t1"), "the item holds a space or a control character"),
    "half a character": (review(1, asin="B\ud800"), "the item holds a space or a control character"),
    "object item": (review(1, asin={"a": "B"}), "the item is missing or no text"),
    "no rating": (review(1, overall=...), "the rating is missing or not a number"),
    "rating as text": (review(1, overall="5.0"), "the rating is missing or not a number"),
    "rating true": (review(1, overall=True), "the rating is missing or not a number"),
    "rating 6": (review(1, overall=6), "the rating is out of range"),
    "rating -1": (review(1, overall=-1), "the rating is out of range"),
    "NaN": (review(1, overall=float("nan")), "not JSON"),
    "a rating of 400 digits": (review(1).replace("2.0", "1" + "0" * 400), "the rating is out of range"),
    "a time of 400 digits": (review(1, unixReviewTime=10**400), "the time is out of range"),
    "1e400": (review(1).replace("2.0", "1e400"), "the rating is missing or not a number"),
    "no time": (review(1, unixReviewTime=None), "the time is missing or not a number"),
    "negative time": (review(1, unixReviewTime=-5), "the time is out of range"),
    "endless time": (review(1, unixReviewTime=10**30), "the time is out of range"),
    "cut": (review(1)[:60], "not JSON"),
    "two values": (review(1) + review(2), "not JSON"),
    "a comma behind": (review(1) + ",", "not JSON"),
    "Python": ("{'reviewerID': 'A', 'asin': 'B', 'overall': 5.0, 'unixReviewTime': 1}", "not JSON"),
    "list": ("[1, 2]", "not a JSON object"),
    "number": ("12", "not a JSON object"),
    "null": ("null", "not a JSON object"),
    "deep": ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deep"),
    "not UTF-8": (b'{"reviewerID": "A\xff", "asin": "B", "overall": 5, "unixReviewTime": 1}', "not UTF-8"),
}
GOOD = {
    "user as number": (review(1, reviewerID=12), ("12", "B1", 2.0, 10**9 + 1, "naïve text 1")),
    "item of other characters": (review(1, asin="é.{}\""), ("A1", 'é.{}"', 2.0, 10**9 + 1, "naïve text 1")),
    "user named true": (review(1, reviewerID="true"), ("true", "B1", 2.0, 10**9 + 1, "naïve text 1")),
    "old user": (review(1, reviewerID="#oc-R1"), ("#oc-R1", "B1", 2.0, 10**9 + 1, "naïve text 1")),
    "rating 0": (review(1, overall=0), ("A1", "B1", 0.0, 10**9 + 1, "naïve text 1")),
    "milliseconds": (review(1, unixReviewTime=1588687728923), ("A1", "B1", 2.0, 1588687728, "naïve text 1")),
    "time with a point": (review(1, unixReviewTime=12.75), ("A1", "B1", 2.0, 12, "naïve text 1")),
    "no text": (review(1, reviewText=...), ("A1", "B1", 2.0, 10**9 + 1, None)),
    "text as list": (review(1, reviewText=["a"]), ("A1", "B1", 2.0, 10**9 + 1, '["a"]')),
    "first of a key": (review(1)[:-1] + ', "overall": 5.0}', ("A1", "B1", 2.0, 10**9 + 1, "naïve text 1")),
    "line break inside": (review(1, reviewText="a\nb"), ("A1", "B1", 2.0, 10**9 + 1, "a\nb")),
    "Windows": (review(1) + "\r", ("A1", "B1", 2.0, 10**9 + 1, "naïve text 1")),
}


@pytest.fixture(params=["polars", "by line"])
def path_taken(request, monkeypatch):
    """Both ways of reading: what polars takes must be what the strict reader takes."""
    if request.param == "by line":
        def refuse(*_):
            raise pl.exceptions.ComputeError("refused")
        monkeypatch.setattr(JsonReviews, "frame", refuse)
        monkeypatch.setattr(CsvRatings, "frame", refuse)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_counted_with_its_place(tmp_path, path_taken, case):
    line, reason = BAD[case]
    content = [line if isinstance(line, bytes) else line.encode(),
               *(review(number).encode() for number in (5, 6))]
    path = tmp_path / "x.json"
    path.write_bytes(content[1] + b"\n\n" + content[0] + b"\n  \n" + content[2] + b"\n")
    raw, rows = read(path)
    assert rows["row"].to_list() == [1, 5]      # blank lines are passed over but counted
    assert raw.skips.as_dict() == {reason: {"count": 1, "first": "x.json, line 3"}}
    path.write_bytes(content[1] + b"\n" + content[0] + b"\n" + content[2] + b"\n")
    raw, rows = read(path)
    assert rows["row"].to_list() == [1, 3]
    assert raw.skips.as_dict() == {reason: {"count": 1, "first": "x.json, line 2"}}


@pytest.mark.parametrize("case", GOOD)
def test_an_odd_line_is_taken_as_it_is(tmp_path, path_taken, case):
    line, expected = GOOD[case]
    raw, rows = read(write(tmp_path / "x.json", [review(5), line, review(6)]))
    assert rows.rows()[1] == (2, *expected)
    assert not raw.skips.total and rows.height == 3


@pytest.mark.parametrize("lines", [[], ["", ""], ["a"], ["[[", "{[]}{", "]]]"], ["", "[", "", "{{{"]])
def test_brackets_are_counted_line_by_line(lines):
    expected = max((line.count("[") + line.count("{") for line in lines), default=0)
    assert reviews.most_brackets("".join(f"{line}\n" for line in lines).encode()) == expected


def test_an_unguarded_polars_never_sees_deep_nesting(tmp_path, monkeypatch):
    monkeypatch.setattr(reviews, "_UNGUARDED", True)
    monkeypatch.setattr(reviews.pl, "read_ndjson", lambda *_, **__: pytest.fail("reached polars"))
    raw, rows = read(write(tmp_path / "x.json", [review(1), BAD["deep"][0]]))
    assert rows.height == 1 and raw.skips.as_dict() == {
        "nested too deep": {"count": 1, "first": "x.json, line 2"}}


def test_bad_lines_keep_their_numbers_across_chunks(tmp_path, small_chunks):
    draw = random.Random(3)
    bad = [line for line, _ in BAD.values() if isinstance(line, str) and len(line) < 700]
    lines = [draw.choice(bad) if draw.random() < 0.2 else review(number) for number in range(300)]
    lines = ["" if draw.random() < 0.05 else line for line in lines]
    good = [number for number, line in enumerate(lines, 1) if line and line not in bad]
    raw, rows = read(write(tmp_path / "x.json", lines))
    assert rows["row"].to_list() == good
    assert raw.lines == 300 and raw.skips.total == 300 - len(good) - lines.count("")
    first = {}
    reasons = dict(BAD.values())
    for number, line in enumerate(lines, 1):
        if line in reasons:
            first.setdefault(reasons[line], f"x.json, line {number}")
    assert {reason: count["first"] for reason, count in raw.skips.as_dict().items()} == first


def test_an_endless_line_neither_fills_the_memory_nor_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1 << 16)
    monkeypatch.setattr(module, "_BLOCK", 1 << 12)
    monkeypatch.setattr(module, "LINE_LIMIT", 1 << 17)
    # Valid JSON, and valid again if its middle were merely dropped.
    path = write(tmp_path / "x.json", [review(1), review(2, reviewText="a" * (1 << 22)), review(3)])
    sizes = [len(chunk.text) for chunk in RawFile(path).chunks()]
    assert max(sizes) < 1 << 18
    raw, rows = read(path)
    assert rows["row"].to_list() == [1, 3]
    assert raw.skips.as_dict() == {"not JSON": {"count": 1, "first": "x.json, line 2"}}


def test_a_byte_order_mark_is_no_part_of_an_id(tmp_path, path_taken):
    path = tmp_path / "x.json"
    path.write_text(f"{review(1)}\n{review(2)}\n", encoding="utf-8-sig")
    assert read(path)[1]["user_id"].to_list() == ["A1", "A2"]
    path.write_text("A1,B1,5,1\nA2,B2,5,1\n", encoding="utf-8-sig")
    _, rows = ratings(path, ("user_id", "item_id", "rating", "timestamp"))
    assert rows["user_id"].to_list() == ["A1", "A2"]


def test_a_file_without_a_last_line_break_is_read_to_its_end(tmp_path):
    assert read(write(tmp_path / "x.json", [review(1), review(2)], end=""))[1].height == 2


def test_a_file_that_ends_within_a_line_was_cut_off(tmp_path):
    path = write(tmp_path / "x.json", [review(1), review(2)[:50]], end="")
    with pytest.raises(DataError, match=r"x\.json, line 2: not JSON, and the file ends.*download it again"):
        read(path)


@pytest.mark.parametrize("cut", [0.5, 0.99])
def test_truncated_gzip(tmp_path, cut):
    draw = random.Random(0)
    lines = [review(number, reviewText=str(draw.random())) for number in range(20_000)]
    whole = gzip.compress("\n".join(lines).encode())
    path = tmp_path / "x.json.gz"
    path.write_bytes(whole[:int(len(whole) * cut)])
    with pytest.raises(DataError, match=r"gz: not a complete gzip.*nothing was written: d") as error:
        read(path)
    told = int(str(error.value).split("; ")[1].split()[0].replace(",", ""))
    assert cut * len(lines) - 2000 < told < cut * len(lines) + 200      # but for the last block


@pytest.mark.parametrize("content, message", [
    (b"", "is empty; download it again"),
    (gzip.compress(b"", mtime=0), "is empty; download it again"),
    (b"\x1f\x8bhello, this is no gzip file at all", "not a complete gzip file"),
    (gzip.compress(b"{}\n", mtime=0) + b"tail", "not a complete gzip file"),
    (b"\n\n \n", "none of its 3 lines can be used; download it again"),
    (b"{}\n{}\n", "none of its 2 lines can be used"),
])
def test_a_useless_file(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"x.json: {message}"):
        read(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: cannot be read \(No such file"):
        read(tmp_path / "none.json")


def test_too_many_bad_lines_are_another_layout(tmp_path):
    lines = [review(number) for number in range(196)] + [review(7, overall=9)] * 4
    path = write(tmp_path / "x.json", lines)
    assert read(path, max_bad=0.02)[1].height == 196
    with pytest.raises(DataError, match=r"4 of 200 lines that were parsed cannot be used, more than 1\.00% "
                                        r"\(left out 4: the rating is out of range \(first: x\.json, line "
                                        r"197\)\).*--max-bad"):
        read(path, max_bad=0.01)


def test_another_layout_is_not_read_to_its_end(tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr(module, "_EARLY", 1000)
    path = write(tmp_path / "x.json", ['{"rating": 5.0, "title": "x"}'] * 5000)
    raw = RawFile(path)
    with pytest.raises(DataError, match=r"none of the first 1,0\d\d lines can be used .*another layout"):
        list(read_rows(raw, JsonReviews(NAMES)))
    assert raw.lines < 1200


@pytest.mark.parametrize("place", ["start", "end"])
def test_where_bad_lines_stand_does_not_matter(tmp_path, small_chunks, monkeypatch, place):
    """Few of all lines are bad, but many of those that were read when they were."""
    monkeypatch.setattr(module, "_EARLY", 10)
    good, bad = [review(number) for number in range(2000)], ["not json"] * 15
    lines = good[:5] + bad + good[5:] if place == "start" else good + bad
    raw, rows = read(write(tmp_path / "x.json", lines), max_bad=0.01)
    assert rows.height == 2000 and raw.skips.total == 15


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("zipped", [False, True])
def test_another_encoding_is_named(tmp_path, encoding, zipped):
    content = f"{review(1)}\n{review(2)}\n".encode(encoding)
    path = tmp_path / "x.json"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(DataError, match=r"x\.json: is probably UTF-16 and not UTF-8; convert it"):
        read(path)
    with pytest.raises(DataError, match="is probably UTF-16"):
        first_line(path)


@pytest.mark.parametrize("start", ["<!DOCTYPE html>", "\ufeff\n  <html lang='en'>", "<?xml version='1.0'?>"])
def test_a_web_page_is_named(tmp_path, start):
    path = write(tmp_path / "x.json", [start, "<title>404</title>"])
    with pytest.raises(DataError, match=r"x\.json: looks like a web page"):
        read(path)


def ratings(path, columns, header=False):
    raw = RawFile(path, 1.0)
    return raw, pl.concat(read_rows(raw, CsvRatings(columns), header))


def test_ratings_of_all_editions(tmp_path, path_taken):
    plain = ("user_id", "item_id", "rating", "timestamp")
    expected = [("A1", "B1", 5.0, 1_400_000_000), ("A2", "B2", 3.0, 1_500_000_000)]
    path = write(tmp_path / "a.csv", ["A1,B1,5.0,1400000000", "A2,B2,3.0,1500000000"])
    assert [row[1:] for row in ratings(path, plain)[1].rows()] == expected
    path = write(tmp_path / "b.csv", ["B1,A1,5.0,1400000000", "B2,A2,3.0,1500000000"])
    columns = ("item_id", "user_id", "rating", "timestamp")
    assert [row[1:] for row in ratings(path, columns)[1].rows()] == expected
    path = tmp_path / "c.csv.gz"
    path.write_bytes(gzip.compress(b"user_id,parent_asin,rating,timestamp,history\r\n"
                                   b"A1,B1,5.0,1400000000123,\r\nA2,B2,3.0,1500000000999,B1 B9\r\n"))
    raw, rows = ratings(path, (*plain, "history"), header=True)
    assert rows.rows() == [(number, *row) for number, row in enumerate(expected, 2)] and raw.lines == 3
    assert first_line(path) == "user_id,parent_asin,rating,timestamp,history"


@pytest.mark.parametrize("line, reason", [
    ("A1,B1,5.0", "not 4 fields"), ("A1,B1,5.0,1,2", "not 4 fields"), ("A1,B1,x,1", "the rating or the time"),
    ("A1,B1,nan,1", "the rating is missing"), ("A1,B1,5,inf", "the time is missing"),
    ("A1,B1,,1", "the rating or"),
    (",B1,5.0,1", "the user is missing"), ("A1,,5.0,1", "the item is missing"),
    ('"A 1",B1,5.0,1', "the user holds"), ('"A1,B1,5.0,1', "not CSV"), ('"A1"x,B1,5.0,1', "not CSV"),
    ("A1,B1,7,1", "the rating is out of range"),
])
def test_a_bad_rating_is_counted(tmp_path, path_taken, line, reason):
    path = write(tmp_path / "x.csv", ["A0,B0,1.0,5", "", line, "A2,B2,2.0,6"])
    raw, rows = ratings(path, ("user_id", "item_id", "rating", "timestamp"))
    assert rows.rows() == [(1, "A0", "B0", 1.0, 5), (4, "A2", "B2", 2.0, 6)]
    (told, count), = raw.skips.as_dict().items()
    assert told.startswith(reason) and count == {"count": 1, "first": "x.csv, line 3"}


def test_quotes_are_no_part_of_an_id(tmp_path, path_taken):
    path = write(tmp_path / "x.csv", ["A0,B0,1.0,5", '"A1","B1",5.0,6', '"A2","B2","4.0","7"\r'])
    raw, rows = ratings(path, ("user_id", "item_id", "rating", "timestamp"))
    assert rows.rows() == [(1, "A0", "B0", 1.0, 5), (2, "A1", "B1", 5.0, 6), (3, "A2", "B2", 4.0, 7)]
    assert not raw.skips.total
