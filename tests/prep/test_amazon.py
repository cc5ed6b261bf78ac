"""From raw files to data sets: a real excerpt against plain counting, three layouts, metadata, bad input."""

import ast
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from amazon_files import Item, Rating, meta_line, review_line, write_lines

from dataset_prep import metadata
from dataset_prep.cli import main
from dataset_prep.editions import EDITIONS
from dataset_prep.filters import Filters
from dataset_prep.metadata import read_items
from dataset_prep.pipeline import Source, prepare
from dataset_prep.raw import RawFile
from recbole_mmdiff.data.atomic import read_atomic
from recbole_mmdiff.errors import ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = REPOSITORY.parent / "shared" / "data" / "amazon-raw-2014"
RATINGS = [Rating("A1", "B1", 5.0, 1_300_000_003, "One\ttwo <br /> three"),
           Rating("A1", "B2", 3.0, 1_300_000_001, ""), Rating("A2", "B1", 4.0, 1_300_000_002, 'say "so"'),
           Rating("A2", "B1", 1.0, 1_200_000_002, "older")]
ITEMS = [Item("B1", "A &amp; B\n<b>bold</b>", "Brand", ("Cat, & dog", "Cat"), "long <p>text</p>", 1234.5,
              "https://x/1.jpg"), Item("B3", "never rated")]


def rows_of(path):
    """The cells of an atomic file, by plain splitting."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def listed(folder):
    """The names in a folder of data sets but for the hidden one of the locks, which are all that is in it."""
    assert {path.suffix for path in folder.glob(".prepare/*")} <= {".lock"}
    return sorted(name for name in os.listdir(folder) if name != ".prepare")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real reviews and items, prepared, and by plain Python."""
    if not REAL.is_dir():
        pytest.skip("the real raw files are not beside the checkout")
    output = tmp_path_factory.mktemp("real")
    source = Source("music", "2014", REAL / "reviews_Digital_Music_5.json.gz",
                    meta=REAL / "meta_Digital_Music.json.gz")
    record, = prepare([source], Filters(min_words=50, k_core=3), output, texts=True)
    with gzip.open(source.reviews, "rt", encoding="utf-8") as file:
        reviews = [json.loads(line) for line in file]
    with gzip.open(source.meta, "rt", encoding="utf-8") as file:
        items = {item["asin"]: item for item in map(ast.literal_eval, file)}
    return output / "music", record, reviews, items


def test_the_real_reviews_equal_an_independent_count(real):
    folder, record, reviews, _ = real
    read, words = ({"name": name, "rows": len(rows), "users": len({row["reviewerID"] for row in rows}),
                    "items": len({row["asin"] for row in rows})} for name, rows in (
        ("ratings in the raw file", reviews),
        ("reviews of >= 50 words", [row for row in reviews if len(row["reviewText"].split()) >= 50])))
    assert record["steps"][:2] == [read, words] and read["rows"] == 4000
    kept = {(row["reviewerID"], row["asin"]): (str(row["overall"]), str(row["unixReviewTime"]))
            for row in reviews if len(row["reviewText"].split()) >= 50}
    before = None
    while before != len(kept):
        before = len(kept)
        users, items = Counter(user for user, _ in kept), Counter(item for _, item in kept)
        kept = {key: value for key, value in kept.items() if users[key[0]] >= 3 and items[key[1]] >= 3}
    head, *rows = rows_of(folder / "music.inter")
    assert head == ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
    assert {(user, item): (rating, time) for user, item, rating, time in rows} == kept
    assert rows == sorted(rows, key=lambda row: (row[0], int(row[3]), row[1]))
    users, items = ({key[place] for key in kept} for place in (0, 1))
    assert record["counts"] == {"users": len(users), "items": len(items), "ratings": len(kept)}


def test_the_real_items_are_those_of_the_metadata(real):
    folder, record, _, items = real
    table = read_atomic(folder / "music.item", None, {"item_id"}).fillna({"price": -1}).fillna("")
    assert table.item_id.to_list() == sorted({row[1] for row in rows_of(folder / "music.inter")[1:]})
    for row in table.itertuples():
        item = items[row.item_id]
        assert row.title == " ".join(re.sub("&amp;", "&", item.get("title", "")).split())
        assert row.price == item.get("price", -1)
        assert row.image_url == ("" if "no-img" in item.get("imUrl", "") else item.get("imUrl", ""))
        names = dict.fromkeys(name for path in item["categories"] for name in path)
        assert row.categories == ", ".join(names)
    assert record["items_without"]["brand"] == (table.brand == "").sum() > 0


def test_the_command_counts_the_real_files_as_plain_python_does(tmp_path, capsys, real):
    """Without filters, so that the counts are those of the files."""
    _, _, reviews, items = real
    main(["amazon", "--edition", "2014", "--reviews", str(REAL / "reviews_Digital_Music_5.json.gz"), "--meta",
          str(REAL / "meta_Digital_Music.json.gz"), "--name", "all", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "all" / "all.prep.json").read_text())
    rated = {row["asin"] for row in reviews}
    counts = {"ratings": len({(row["reviewerID"], row["asin"]) for row in reviews}), "items": len(rated),
              "users": len({row["reviewerID"] for row in reviews})}
    assert record["counts"] == counts
    assert len(rows_of(tmp_path / "all" / "all.inter")) == counts["ratings"] + 1
    table = {row[0]: row for row in rows_of(tmp_path / "all" / "all.item")[1:]}
    assert set(table) == rated
    without = {name: sum(not str(items.get(item, {}).get(name) or "").strip() for item in rated)
               for name in ("title", "description", "brand")}
    assert 0 < without["description"] < without["brand"] < len(rated)
    assert {name: record["items_without"].get(name, 0) for name in without} == without
    assert sum(not row[1] for row in table.values()) == without["title"]
    printed = capsys.readouterr().out
    assert "reviews_Digital_Music_5.json.gz: 4,000 lines, 0 left out" in printed
    assert f"{4000 - sum(item in rated for item in items):,} lines of items not needed were not" in printed


def test_the_real_texts_are_kept(real):
    folder, _, reviews, _ = real
    texts = {(row["reviewerID"], row["asin"]): " ".join(row["reviewText"].split()) for row in reviews}
    table = pl.read_parquet(folder / "music.reviews.parquet")
    assert table.schema == {"user_id": pl.String, "item_id": pl.String, "rating": pl.Float32,
                            "timestamp": pl.Int64, "review": pl.String}
    rows = rows_of(folder / "music.inter")[1:]
    assert [list(map(str, row)) for row in table.drop("review").rows()] == rows
    assert table["review"].to_list() == [texts[user, item] for user, item, *_ in rows]


def test_the_record_says_where_all_came_from(real):
    folder, _, _, _ = real
    record = json.loads((folder / "music.prep.json").read_text())
    assert [raw["name"] for raw in record["raw"]] == ["reviews_Digital_Music_5.json.gz",
                                                      "meta_Digital_Music.json.gz"]
    for raw in record["raw"]:
        content = (REAL / raw["name"]).read_bytes()
        assert raw == {"name": raw["name"], "bytes": len(content), "lines": 4000, "left_out": {},
                       "not_needed": raw["not_needed"], "sha256": hashlib.sha256(content).hexdigest()}
    assert record["raw"][0]["not_needed"] == 0 < record["raw"][1]["not_needed"] < 4000
    assert record["recipe"]["filters"]["min_words"] == 50 and record["recipe"]["texts"] is True
    assert {"python", "polars", "recbole_mmdiff", "files"} <= set(record)
    assert listed(folder.parent) == ["music"]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("edition", EDITIONS)
def test_the_layouts_of_all_editions(tmp_path, edition, zipped):
    reviews = write_lines(tmp_path / "r", [review_line(edition, rating) for rating in RATINGS], zipped)
    meta = write_lines(tmp_path / "m", [meta_line(edition, item) for item in ITEMS], zipped)
    prepare([Source("d", edition, reviews, meta=meta)], Filters(), tmp_path, texts=True)
    assert rows_of(tmp_path / "d" / "d.inter")[1:] == [
        ["A1", "B2", "3.0", "1300000001"], ["A1", "B1", "5.0", "1300000003"],
        ["A2", "B1", "4.0", "1300000002"]]
    assert rows_of(tmp_path / "d" / "d.item") == [
        ["item_id:token", "title:token_seq", "brand:token_seq", "categories:token_seq",
         "description:token_seq", "price:float", "image_url:token"],
        ["B1", "A & B bold", "Brand", "Cat, & dog, Cat", "long text", "1234.5", "https://x/1.jpg"],
        ["B2", "", "", "", "", "", ""]]
    texts = pl.read_parquet(tmp_path / "d" / "d.reviews.parquet")["review"].to_list()
    assert texts == ["", "One two <br /> three", 'say "so"']


@pytest.mark.parametrize("edition, lines", [
    ("2014", ["A1000000000001,B000000001,5.0,1300000003", "A2000000000002,B000000001,4.0,1300000002"]),
    ("2018", ["B000000001,A1000000000001,5.0,1300000003", "B000000001,A2000000000002,4.0,1300000002"]),
    ("2023", ["user_id,parent_asin,rating,timestamp", "A1000000000001,B000000001,5.0,1300000003000",
              "A2000000000002,B000000001,4.0,1300000002999"]),
])
def test_ratings_files(tmp_path, edition, lines):
    path = write_lines(tmp_path / "x.csv", lines, zipped=edition == "2023")
    main(["amazon", "--edition", edition, "--ratings", str(path), "--name", "d", "--output", str(tmp_path)])
    assert rows_of(tmp_path / "d" / "d.inter")[1:] == [
        ["A1000000000001", "B000000001", "5.0", "1300000003"],
        ["A2000000000002", "B000000001", "4.0", "1300000002"]]
    assert not (tmp_path / "d" / "d.item").exists()


@pytest.mark.parametrize("line, edition, message", [
    ("B000000001,A1000000000001,5.0,1300000003", "2014", "users and items look swapped for the edition 2014"),
    ("A1000000000001,B000000001,5.0,1300000003", "2018", "users and items look swapped for the edition 2018"),
    ("A1000000000001,B000000001,5.0,1300000003", "2023", "line 1: the header .* lacks 'user_id'"),
    ("user_id,asin,rating,timestamp", "2023", "line 1: the header .* lacks 'item_id'"),
])
def test_ratings_of_another_edition(tmp_path, line, edition, message):
    path = write_lines(tmp_path / "x.csv", [line, line])
    with pytest.raises(DataError, match=message):
        prepare([Source("d", edition, path, csv=True)], Filters(), tmp_path)
    assert listed(tmp_path) == ["x.csv"]


@pytest.mark.parametrize("lost", [1, 4, 9])
@pytest.mark.parametrize("tail", ["", "\n"])
def test_ratings_that_were_cut_off_within_a_time(tmp_path, lost, tail):
    """What is left of a time is a number too: only the missing line break tells it from a short one."""
    path = tmp_path / "x.csv"
    lines = "".join(f"A100000000000{number},B000000001,5.0,130000000{number}\n" for number in range(5))
    source = Source("d", "2014", path, csv=True)
    path.write_text(lines[:-1 - lost] + tail)
    if tail:
        prepare([source], Filters(), tmp_path)
    else:
        with pytest.raises(DataError, match=r"x\.csv, line 5: ends without a line break after the time 1"):
            prepare([source], Filters(), tmp_path)
        assert listed(tmp_path) == ["x.csv"]
    path.write_text(lines[:-1])     # merely without its last line break
    record, = prepare([source], Filters(), tmp_path)
    assert record["counts"]["ratings"] == 5


def items_of(tmp_path, edition, lines, needed, max_bad=0.9):
    """Items, what was mended and what was left out of these lines and one more that is plain metadata."""
    lines = [*lines, json.dumps({EDITIONS[edition].item: "plain", "title": "plain"})]
    raw = RawFile(write_lines(tmp_path / "meta.json", lines), max_bad)
    table, mended = read_items(raw, EDITIONS[edition], needed | {"plain"})
    found = {row.pop("item_id"): row for row in table.rows(named=True)}
    assert found.pop("plain")["title"] == "plain"
    return found, mended, raw.skips.as_dict()


CODE = "{'asin': 'B1', 'title': __import__('pathlib').Path('%s').touch()}"


@pytest.mark.parametrize("line, reason", [
    (CODE, "neither JSON nor a Python literal"),
    ("{'asin': 'B1', 'title': 'x' * 10**9}", "neither JSON nor a Python literal"),
    ("{'asin': 'B1', 'title': 'cut of", "neither JSON nor a Python literal"),
    ("{'asin': 'B1', [1]: 2}", "neither JSON nor a Python literal"),
    ("{'asin': 'B1', 'x': " + "[" * 5000 + "]" * 5000 + "}", "neither JSON nor a Python literal"),
    ("{'asin': 'B1', 'x': 1" + "+1" * 100_000 + "}", "nested too deep"),
    ("{'asin': 'B1', 'x': " + "-" * 100_000 + "1}", "nested too deep"),
    ("{'asin': 'B1', 'x': " + "9" * 5000 + "}", "neither JSON nor a Python literal"),
    ("{'asin': 'B1', 'x': '" + "a" * (5 << 20) + "'}", "longer than 4 MiB"),
    ("{'title': 'no id'}", "no asin"), ("{'asin': 7}", "no asin"), ("['asin', 'B1']", "not an object"),
    ("{'asin': 'B1', 'title': '\0'}", "neither JSON nor a Python literal"),
])
def test_bad_metadata_is_counted_and_never_run(tmp_path, line, reason):
    touched = tmp_path / "touched"
    line = line.replace("%s", str(touched))
    found, _, skipped = items_of(tmp_path, "2014", ["{'asin': 'B2', 'title': 'fine'}", line], {"B1", "B2"})
    assert list(found) == ["B2"] and found["B2"]["title"] == "fine"
    assert skipped == {reason: {"count": 1, "first": "meta.json, line 2"}}
    assert not touched.exists()


def test_metadata_of_2014_may_be_json_too(tmp_path):
    lines = ['{"asin": "B1", "title": null, "price": 2}',
             "{'asin': 'B2', 'title': u'caf\\xe9 \"x\"', 'price': None}"]
    found, _, skipped = items_of(tmp_path, "2014", lines, {"B1", "B2"})
    assert (found["B1"]["title"], found["B1"]["price"], found["B2"]["title"]) == (None, 2.0, 'café "x"')
    assert not skipped


def test_literals_are_not_read_in_json_editions(tmp_path):
    lines = ["{'asin': 'B1'}", '{"asin": "B2"}']
    _, _, skipped = items_of(tmp_path, "2018", lines, {"B1", "B2"})
    assert skipped == {"not JSON": {"count": 1, "first": "meta.json, line 1"}}


def test_only_needed_lines_are_parsed(tmp_path, monkeypatch):
    parsed = []
    original = metadata.ast.literal_eval
    monkeypatch.setattr(metadata.ast, "literal_eval", lambda text: parsed.append(text) or original(text))
    lines = [f"{{'asin': 'B{number}', 'title': 'x'}}" for number in range(50)]
    lines.append("{'title': 'x', 'asin': \"B\\x37\"}")
    found, _, _ = items_of(tmp_path, "2014", lines, {"B7"})
    assert list(found) == ["B7"]
    assert parsed == [lines[7], lines[50]]      # the last hides its id in an escape


def test_duplicate_items_are_merged_and_counted(tmp_path):
    lines = [json.dumps(item) for item in (
        {"asin": "B1", "title": "", "price": "$3"}, {"asin": "B2", "title": "two"},
        {"asin": "B1", "title": "first", "brand": "b"}, {"asin": "B1", "title": "second", "price": "$4"})]
    found, mended, _ = items_of(tmp_path, "2018", lines, {"B1", "B2"})
    assert mended == {"duplicate lines merged": 2}
    assert (found["B1"]["title"], found["B1"]["price"], found["B1"]["brand"]) == ("first", 3.0, "b")


def test_titles_of_page_code_are_missing_titles(tmp_path):
    lines = [json.dumps({"asin": "B1", "title": "var aPageStart = (new Date()).getTime();"})]
    found, mended, _ = items_of(tmp_path, "2018", lines, {"B1"})
    assert found["B1"]["title"] is None and mended == {"titles of page code": 1}


@pytest.mark.parametrize("edition, fields, expected", [
    ("2014", {"imUrl": "http://x/1.jpg"}, "http://x/1.jpg"),
    ("2014", {"imUrl": "ftp://x/1.jpg"}, None),
    ("2014", {"imUrl": "http://g-ecx.images-amazon.com/images/G/01/x-site/icons/no-img-sm._CB1_.gif"}, None),
    ("2014", {"imUrl": ["http://x/1.jpg"]}, None),
    ("2018", {"imageURL": ["http://x/s.jpg"], "imageURLHighRes": ["http://x/l.jpg"]}, "http://x/l.jpg"),
    ("2018", {"imageURL": ["http://x/s.jpg"], "imageURLHighRes": []}, "http://x/s.jpg"),
    ("2018", {"image": ["http://x/old.jpg"]}, "http://x/old.jpg"),
    ("2018", {"imageURL": None}, None),
    ("2023", {"images": [{"thumb": "http://x/t.jpg", "large": "http://x/l.jpg", "hi_res": "http://x/h.jpg"}]},
     "http://x/h.jpg"),
    ("2023", {"images": [{"thumb": "http://x/t.jpg", "large": "http://x/l.jpg", "hi_res": None},
                         {"hi_res": "http://y"}]}, "http://x/l.jpg"),
    ("2023", {"images": {"hi_res": [None, "http://x/2.jpg"], "large": ["http://x/l.jpg"], "thumb": []}},
     "http://x/l.jpg"),
    ("2023", {"images": {}}, None), ("2023", {"images": []}, None), ("2023", {"images": ["http://x"]}, None),
])
def test_the_image_is_the_largest_of_the_first(tmp_path, edition, fields, expected):
    line = json.dumps({EDITIONS[edition].item: "B1", **fields})
    found, mended, _ = items_of(tmp_path, edition, [line], {"B1"})
    assert found["B1"]["image_url"] == expected
    assert mended == ({"placeholder images": 1} if "no-img" in line else {})


@pytest.mark.parametrize("price, expected", [
    (9.5, 9.5), ("$9.99", 9.99), ("$1,234.50", 1234.5), ("$10.00 - $20.00", 10.0), ("from 14.99", 14.99),
    (None, None), ("", None), (".a-box-inner{padding:4px}", None), (True, None), (-1, None),
    (float("inf"), None), ([3], None),
])
def test_prices(tmp_path, price, expected):
    line = json.dumps({"asin": "B1", "price": price}).replace("Infinity", "1e999")
    found, _, _ = items_of(tmp_path, "2018", [line], {"B1"})
    assert found["B1"]["price"] == expected


@pytest.mark.parametrize("text, expected", [
    ("a\tb\r\nc\u2028d\x00e", "a b c d e"), ("<b>x</b> &amp; y", "x & y"),
    ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"), ("<p>one</p><!-- <no> -->2<br/>3<BR class='x' />4", "one 2 3 4"),
    ("Songs <Live>", "Songs <Live>"), ("Songs &lt;Deluxe Edition&gt;", "Songs <Deluxe Edition>"),
    ("<i>one</i> <3 <Bonus>", "one <3 <Bonus>"),
    (["one ", ["two"], None, 3], "one two"), ("\ud800x", "?x"), ([], None), ({"a": 1}, None), ("&#10;", None),
])
def test_texts(tmp_path, text, expected):
    found, _, _ = items_of(tmp_path, "2018", [json.dumps({"asin": "B1", "description": text})], {"B1"})
    assert found["B1"]["description"] == expected


def test_metadata_of_something_else(tmp_path):
    path = write_lines(tmp_path / "meta.json", ['{"asin": "B1"}'])
    with pytest.raises(DataError, match=r"meta\.json: its 1 lines hold none of the 1 items that were rated"):
        read_items(RawFile(path), EDITIONS["2018"], {"B2"})
    with pytest.raises(DataError, match=r"meta\.json: looks like something else, not like metadata"):
        read_items(RawFile(path), EDITIONS["2018"], {"B1"})
    with pytest.raises(DataError, match=r"1 of 3 lines that were parsed cannot be used, more than 1\.00%"):
        items_of(tmp_path, "2018", ['{"asin": "B1"}', "B2"], {"B1"}, max_bad=0.01)


@pytest.mark.parametrize("edition", EDITIONS)
def test_reviews_are_no_metadata(tmp_path, edition):
    path = write_lines(tmp_path / "m", [review_line(edition, rating) for rating in RATINGS])
    with pytest.raises(DataError, match=r"m: looks like reviews, not like metadata"):
        read_items(RawFile(path), EDITIONS[edition], {"B1", "B2"})


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("other", EDITIONS)
def test_metadata_of_another_edition(tmp_path, edition, other):
    lines = [meta_line(other, item) for item in ITEMS]
    if other == "2014":
        lines = [json.dumps(ast.literal_eval(line)) for line in lines]      # there is such a file too
    raw = RawFile(write_lines(tmp_path / "m", lines))
    if edition == other:
        assert read_items(raw, EDITIONS[edition], {"B1"})[0].height == 1
        return
    with pytest.raises(DataError, match=rf"m: (looks like metadata of {other}, not|\d of \d lines|its 2 li)"):
        read_items(raw, EDITIONS[edition], {"B1"})


def test_lines_that_nobody_parsed_do_not_count_as_good(tmp_path):
    """A damaged file of which almost all of the few needed lines are bad."""
    lines = [f'{{"asin": "C{number}", "title": "not needed"}}' for number in range(10_000)]
    lines += [f'{{"asin": "B{number}", "title": cut' for number in range(19)]
    lines.append('{"asin": "B19", "title": "x"}')
    raw = RawFile(write_lines(tmp_path / "m", lines))
    with pytest.raises(DataError, match=r"m: 19 of 20 lines that were parsed cannot be used"):
        read_items(raw, EDITIONS["2018"], {f"B{number}" for number in range(20)})
    assert raw.not_needed == 10_000


def test_plain_metadata_that_was_cut_off(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text("{'asin': 'B1'}\n{'asin': 'B2', 'title': 'cut of")
    with pytest.raises(DataError, match=r"meta\.json, line 2: neither JSON.*was cut off"):
        read_items(RawFile(path), EDITIONS["2014"], {"B1"})     # though nobody asked for B2


def options(tmp_path, *words, count=1):
    reviews = write_lines(tmp_path / "r.json", [review_line("2018", rating) for rating in RATINGS])
    meta = write_lines(tmp_path / "m.json", [meta_line("2018", item) for item in ITEMS])
    return ["amazon", "--edition", "2018", "--output", str(tmp_path / "out"), "--reviews",
            *[str(reviews)] * count, "--meta", *[str(meta)] * count, "--name", *("left", "right")[:count],
            *words]


def test_the_filters_are_options(tmp_path, capsys):
    main(options(tmp_path, "--min-words", "2", "--require", "image,title", "--positive", "4",
                 "--binarize", "5", "--reviews-text"))
    assert rows_of(tmp_path / "out" / "left" / "left.inter")[1:] == [
        ["A1", "B1", "1.0", "1300000003"], ["A2", "B1", "0.0", "1300000002"]]
    printed = capsys.readouterr().out
    assert "r.json: 4 lines, 0 left out" in printed and "items with image, title" in printed


def test_a_pair_keeps_its_common_users(tmp_path):
    words = options(tmp_path, "--common-users", count=2)
    ratings = [RATINGS[2], Rating("A3", "B1", 1.0, 5, "")]
    other = write_lines(tmp_path / "other.json", [review_line("2018", rating) for rating in ratings])
    words[words.index("--reviews") + 2] = str(other)
    main(words)
    for name in ("left", "right"):
        assert {row[0] for row in rows_of(tmp_path / "out" / name / f"{name}.inter")[1:]} == {"A2"}


def test_half_a_pair_is_completed(tmp_path):
    """As after a run that was killed between its two data sets."""
    words = options(tmp_path, "--common-users", count=2)
    main(words)
    lost = tmp_path / "out" / "right" / "right.inter"
    content = lost.read_bytes()
    for path in lost.parent.iterdir():
        path.unlink()
    main(words)
    assert lost.read_bytes() == content


def test_what_is_left_out_is_told(tmp_path, capsys):
    words = options(tmp_path, "--max-bad", "0.5")
    path = tmp_path / "r.json"
    nine = review_line("2018", Rating("A9", "B1", 9.0, 5, ""))
    path.write_text(f"{path.read_text()}not json\n{nine}\n")
    main(words)
    printed = capsys.readouterr().out
    assert "r.json: 6 lines, 2 left out" in printed
    assert "1 not JSON (first: r.json, line 5)" in printed
    assert "1 the rating is out of range (first: r.json, line 6)" in printed
    assert "items without: title 1, brand 1" in printed


@pytest.mark.parametrize("change, error, message", [
    ({"--edition": ["2015"]}, ConfigError, "--edition: '2015' is not known"),
    *(({"--name": [name]}, ConfigError, f"--name: {re.escape(repr(name))} is no name of a data set")
      for name in ("../x", "..", "", "a b", "a\nb", ".a", "a/b")),
    ({"--binarize": ["nan"]}, ConfigError, "--binarize: nan is no rating"),
    ({"--name": []}, SystemExit, "2"),
    ({"--name": ["a", "b"]}, ConfigError, "--name: 2 given for 1 files"),
    ({"--meta": ["a", "b"]}, ConfigError, "--meta: 2 given for 1 files"),
    ({"--require": ["pictures"]}, ConfigError, "--require: 'pictures' is not known"),
    ({"--common-users": []}, ConfigError, "--common-users: needs two files"),
    ({"--max-bad": ["2"]}, ConfigError, "--max-bad: 2.0 is not a share"),
    ({"--k-core": ["99"]}, DataError, "no ratings are left after the filter: 99-core"),
    ({"--duplicates": ["error"]}, DataError, "2 ratings are of a user and an item that have several"),
    ({"--preset": ["music-task9"]}, ConfigError, "--preset: 'music-task9'.*did you mean 'music-task"),
    ({"--preset": ["music-task1"]}, ConfigError, "--preset: needs --raw DIR"),
    ({"--preset": ["ccdrec-baby"], "--raw": ["."], "--edition": None, "--reviews": None, "--meta": None,
      "--name": None, "--common-users": []}, ConfigError, "--common-users: ccdrec-baby is no pair"),
    ({"--preset": ["music-task1"], "--raw": ["."]}, ConfigError, "--edition: does not go with --preset"),
])
def test_options_that_cannot_be(tmp_path, change, error, message):
    words = options(tmp_path)
    for option, values in change.items():
        if option in words:
            start = words.index(option) + 1
            length = next(place for place, word in enumerate([*words[start:], "--"]) if word.startswith("--"))
            words[start - (values is None):start + length] = values or ()
        else:
            words += [option, *values]
    with pytest.raises(error, match=message):
        main(words)
    assert not (tmp_path / "out").exists() or not listed(tmp_path / "out")


def test_options_that_miss_something(tmp_path):
    with pytest.raises(ConfigError, match=r"give --preset .* or --reviews or --ratings"):
        main(["amazon"])
    path = write_lines(tmp_path / "x.csv", ["A,B,5,1"])
    words = ["amazon", "--edition", "2014", "--ratings", str(path), "--name", "d", "--output", str(tmp_path)]
    with pytest.raises(DataError, match=r"x\.csv: has no review texts"):
        main([*words, "--min-words", "3"])
    with pytest.raises(ConfigError, match="--require: needs the metadata"):
        main([*words, "--require", "title"])
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        main([*words, "--meta", str(tmp_path / "none.json")])
    with pytest.raises(ConfigError, match="--name: d d has a name twice"):
        main([*words[:4], str(path), str(path), "--name", "d", "d"])
    assert listed(tmp_path) == ["x.csv"]


def test_a_data_set_is_made_once_and_replaced_only_when_asked(tmp_path, capsys):
    words, folder = options(tmp_path), tmp_path / "out" / "left"
    main([*words, "--reviews-text"])
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(made) == {"left.inter", "left.item", "left.prep.json", "left.reviews.parquet"}
    main([*words, "--reviews-text"])
    assert "there already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == made
    with pytest.raises(DataError, match="another data set is there, made of other files or with other"):
        main(words)
    (folder / "left.text.npy").touch()      # not ours: stays
    main([*words, "--overwrite"])
    assert sorted(os.listdir(folder)) == ["left.inter", "left.item", "left.prep.json", "left.text.npy"]


def test_a_bad_file_leaves_nothing_behind(tmp_path):
    words = options(tmp_path)
    path = tmp_path / "m.json"
    path.write_bytes(gzip.compress(path.read_bytes())[:-9])
    with pytest.raises(DataError, match="not a complete gzip file"):
        main(words)
    assert listed(tmp_path / "out") == []


def test_a_data_set_of_others_is_refused_before_any_work(tmp_path):
    words, other = options(tmp_path, count=2), tmp_path / "out" / "right" / "right.inter"
    write_lines(other, ["user_id:token"])
    with pytest.raises(DataError, match="right: another data set is there"):
        main(words)
    assert listed(tmp_path / "out") == ["right"] and other.read_text() == "user_id:token\n"


def test_what_is_made_depends_on_the_files_and_on_what_may_be_bad(tmp_path, capsys):
    words = options(tmp_path)
    main(words)
    with pytest.raises(DataError, match="another data set is there"):
        main([*words, "--max-bad", "0.5"])
    reviews = tmp_path / "r.json"
    before = reviews.stat()
    reviews.write_text(reviews.read_text().replace("5.0", "2.0"))       # of the same size
    with pytest.raises(DataError, match="another data set is there"):
        main(words)
    main([*words, "--overwrite"])
    assert ["A1", "B1", "2.0", "1300000003"] in rows_of(tmp_path / "out" / "left" / "left.inter")
    assert reviews.stat().st_size == before.st_size


def test_texts_of_a_pair_whose_names_begin_alike(tmp_path):
    """And in a folder whose name is a pattern to those who look for one."""
    words = options(tmp_path, "--common-users", "--reviews-text", "--output", str(tmp_path / "g[1]"), count=2)
    lines = [review_line("2018", Rating("A2", "B1", 1.0, 5, "other text"))]
    other = write_lines(tmp_path / "other.json", lines)
    words[words.index("--reviews") + 2] = str(other)
    words[words.index("--name") + 1:words.index("--name") + 3] = ["a", "a.b"]
    main(words)
    texts = {name: pl.read_parquet(tmp_path / "g[1]" / name / f"{name}.reviews.parquet", glob=False)
             for name in ("a", "a.b")}
    assert {name: table["review"].to_list() for name, table in texts.items()} == {
        "a": ['say "so"'], "a.b": ["other text"]}


SLOW = """
import sys, time
import polars
from dataset_prep import pipeline
from dataset_prep.cli import main

def wait(*_):
    print("reached", flush=True)
    time.sleep(60)

def write_and_wait(table, path, **options):
    write(table, path, **options)
    wait()

write = polars.DataFrame.write_csv
if sys.argv[1] == "within the writing":
    polars.DataFrame.write_csv = write_and_wait
else:
    pipeline.write_dataset = wait
main(sys.argv[2:])
"""


def kill(place, words, meanwhile=None):
    """Run a command in another process and kill it where it reached ``place``."""
    with subprocess.Popen([sys.executable, "-c", SLOW, place, *words], stdout=subprocess.PIPE, text=True,
                          cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}) as process:
        assert process.stdout.readline() == "reached\n"
        if meanwhile:
            meanwhile()
        process.send_signal(signal.SIGKILL)


def test_a_killed_run_leaves_no_data_set_and_the_next_one_cleans_up(tmp_path):
    words = options(tmp_path, "--reviews-text", "--common-users", count=2)
    single = [*options(tmp_path), "--reviews-text", "--name", "right"]

    def both_are_locked():
        for other in (words, single):
            with pytest.raises(DataError, match="another process prepares this data set"):
                main(other)

    kill("before the writing", words, both_are_locked)
    work = tmp_path / "out" / ".prepare" / "left"
    assert list(work.glob("*.parquet")) and os.listdir(tmp_path / "out") == [".prepare"]
    main(words)
    assert listed(tmp_path / "out") == ["left", "right"]


def test_a_run_that_was_killed_while_it_wrote_is_done_again(tmp_path):
    words, folder = options(tmp_path), tmp_path / "out" / "left"
    main([*words, "--reviews-text"])
    kill("within the writing", [*words, "--overwrite"])
    assert list(folder.glob(".*.tmp.*")) and not (folder / "left.inter").exists()
    main(words)     # the very command, which asks for nothing to be replaced
    assert sorted(os.listdir(folder)) == ["left.inter", "left.item", "left.prep.json"]
    made = {path.name: path.read_bytes() for path in folder.glob("left.i*")}
    main([*words, "--output", str(tmp_path / "new")])
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "new" / "left").glob("left.i*")}
