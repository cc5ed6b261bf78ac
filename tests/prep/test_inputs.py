"""What is encoded: texts of items, prompts, and reviews of users without what a split holds out."""

import os
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import write_items

from dataset_prep.inputs import Items, Users, texts_of
from dataset_prep.prompt import Prompt
from recbole_mmdiff.data.splits import FINETUNE, PROTOCOLS, TEST, UNUSED, VALID, SavedSplit
from recbole_mmdiff.errors import ConfigError, DataError

pl = pytest.importorskip("polars")
HEAD = ("item_id:token", "title:token_seq", "year:float", "brand:token", "description:token_seq")
ROWS = [("b", "Heat", "1995", "X", "A heist."), ("a", "", "", "Y", "Only words"), ("c", "", "1990", "", ""),
        ("d", "Alien", "1979.5", "", "")]


@pytest.fixture
def folder(tmp_path):
    return write_items(tmp_path / "toy", ROWS, HEAD)


def all_of(inputs):
    return inputs.part(0, len(inputs.tokens))


# Items


def test_the_text_of_items_is_their_sequences_joined(folder):
    samples = all_of(Items(folder))
    assert [sample.token for sample in samples] == ["b", "a", "c", "d"]
    assert [sample.text for sample in samples] == ["Heat. A heist.", "Only words", "", "Alien"]
    assert [sample.blank for sample in samples] == [False, False, True, False]
    chosen = all_of(Items(folder, ["brand", "year", "title"], separator=" | ", max_characters=4))
    assert [sample.text for sample in chosen] == ["X | 1995 | Heat", "Y", "1990", "1979 | Alie"]
    assert list(texts_of(Items(folder))) == ["Heat. A heist.", "Only words", "Alien"]


def test_prompts_are_filled(folder):
    prompt = Prompt("{{film}} {title} ({year}): {text}!", "here")
    samples = all_of(Items(folder, ["title", "description"], prompt=prompt))
    assert samples[0].text == "{film} Heat (1995): Heat. A heist.!"
    assert samples[1].text == "{film}  (): Only words!"
    assert [sample.blank for sample in samples] == [False] * 4    # the year says something of c
    by_text = all_of(Items(folder, prompt=Prompt("Item: {text}", "here")))
    assert [sample.blank for sample in by_text] == [False, False, True, False]
    curly = write_items(folder.parent / "curly", [("a", "{year} {0.x} %s", "", "", "")], HEAD)
    assert all_of(Items(curly, prompt=Prompt("<{title}>", "here")))[0].text == "<{year} {0.x} %s>"


@pytest.mark.parametrize("place", ["{title.__class__}", "{title[0]}", "{0}", "{}", "{!r}", "{title!r}",
                                   "{title:>9999999}", "{title:{year}}", "{title!s:>9}"])
def test_prompts_reach_no_further_than_plain_names(place):
    with pytest.raises(DataError) as told:
        Prompt(f"{{brand}}, {place}.", "here")
    assert f"here: {place} is not accepted" in str(told.value)


@pytest.mark.parametrize("template, message", [
    ("{title", "not a prompt"), ("title}", "not a prompt"), ("no place {{title}}", "has no {place}"),
])
def test_what_is_no_prompt(template, message):
    with pytest.raises(DataError, match=f"here: .*{message}"):
        Prompt(template, "here")


def test_a_column_called_text(tmp_path):
    """{text} is the joined fields all the same; the column is reached as a field."""
    folder = write_items(tmp_path / "toy", [("a", "Heat", "long"), ("b", "", "only")],
                         ("item_id:token", "title:token_seq", "text:token_seq"))
    samples = all_of(Items(folder, ["title"], prompt=Prompt("<{text}>", "here")))
    assert [(sample.text, sample.blank) for sample in samples] == [("<Heat>", False), ("<>", True)]
    assert all_of(Items(folder, prompt=Prompt("<{text}>", "here")))[0].text == "<Heat. long>"
    assert all_of(Items(folder, ["text"]))[1].text == "only"


def test_unknown_places_and_fields(folder, tmp_path):
    with pytest.raises(DataError, match=r"\{titel\} is unknown, there are text, title.*did you mean 'title'"):
        Items(folder, prompt=Prompt("{titel}", "here"))
    with pytest.raises(DataError, match="has no column 'genres', only title, year"):
        Items(folder, ["genres"])
    with pytest.raises(ConfigError, match="--fields: 'title' stands twice"):
        Items(folder, ["title", "year", "title"])
    with pytest.raises(DataError, match="cannot be read"):
        Prompt.read(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xff{title}")
    with pytest.raises(DataError, match="is not UTF-8"):
        Prompt.read(tmp_path / "latin.txt")
    twice = write_items(tmp_path / "twice", [ROWS[0], ROWS[0]], HEAD)
    with pytest.raises(DataError, match="the item 'b' stands twice"):
        Items(twice)
    with pytest.raises(DataError, match="cannot be read"):
        Items(tmp_path / "nothing")
    with pytest.raises(DataError, match="holds a header but no rows"):
        Items(write_items(tmp_path / "none", [], HEAD))


def test_the_digest_tells_texts_tokens_and_images_apart(folder, tmp_path):
    images = folder / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"1234")
    plain = Items(folder).digest()
    assert Items(folder).digest() == plain
    pictured = Items(folder, images=images).digest()
    (images / "a.png").write_bytes(b"5678")
    renamed = write_items(tmp_path / "x" / "toy", [("B", *ROWS[0][1:]), *ROWS[1:]], HEAD)
    others = [Items(folder, separator=", ").digest(), pictured, Items(folder, images=images).digest(),
              Items(renamed).digest()]
    assert len({plain, *others}) == 5


def test_a_copied_data_set_is_the_same(folder, tmp_path):
    """Times are no part of it; contents of the same size and time are."""
    digests = []
    for name, content, seconds in (("one", b"1234", 1), ("two", b"1234", 2), ("three", b"4321", 2)):
        images = tmp_path / name
        images.mkdir()
        (images / "a.png").write_bytes(content)
        os.utime(images / "a.png", (seconds, seconds))
        digests.append(Items(folder, images=images).digest())
    assert digests[0] == digests[1] != digests[2]


# Users


def reviews(seed=0, users=30):
    """Rows in the order that the file keeps: by user, time and item."""
    draw = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        for item in draw.choice(40, size=draw.integers(1, 9), replace=False):
            words = " ".join(["word"] * int(draw.integers(0, 5)))
            rows.append((f"u{user:02}", f"i{item}", float(draw.integers(1, 6)), int(draw.integers(5)),
                         f" {words} of i{item} " if words else ""))
    return sorted(rows, key=lambda row: (row[0], row[3], row[1]))


def write_reviews(folder, rows, group=16):
    folder.mkdir(parents=True, exist_ok=True)
    frame = pl.DataFrame(rows, ["user_id", "item_id", "rating", "timestamp", "review"], orient="row")
    frame.write_parquet(folder / f"{folder.name}.reviews.parquet", row_group_size=group)
    return folder


def by_hand(rows, latest, characters, held_out=()):
    texts = defaultdict(list)
    for user, item, _, _, review in rows:
        texts[user]    # a user without a review is there too
        if review.strip() and (user, item) not in held_out:
            texts[user].append(review.strip()[:characters])
    return {user: "\n".join(found[-latest:][::-1]) for user, found in texts.items()}


def test_users_are_their_latest_reviews(tmp_path):
    rows = reviews()
    users = Users(write_reviews(tmp_path / "toy", rows), reviews_per_user=3, max_characters=12)
    expected = by_hand(rows, 3, 12)
    assert users.tokens == list(expected)
    assert {sample.token: sample.text for sample in all_of(users)} == expected
    parts = [sample for start in range(0, len(expected), 7) for sample in users.part(start, start + 7)]
    assert parts == all_of(users)
    assert [sample.blank for sample in parts] == [not text for text in expected.values()]
    assert 0 < sum(not text for text in expected.values()) < len(expected)
    prompted = Users(tmp_path / "toy", Prompt("Likes: {reviews}.", "here"), 3, 12)
    assert all_of(prompted)[5].text == f"Likes: {expected[users.tokens[5]]}."


def split_file(path, target, source=(), protocol="ratio", parts=(TEST, VALID)):
    def columns(pairs):
        return [np.array([pair[place] for pair in pairs], dtype=str) for place in (0, 1)]

    more = {}
    if source:
        more = dict(zip(("source_user", "source_item"), columns(source), strict=True))
        more["source_part"] = np.full(len(source), VALID)
    SavedSplit(protocol, np.array([], dtype=str), *columns(target),
               np.resize(parts, len(target)), **more).save(path)
    return path


def test_a_split_leaves_out_what_it_holds_out(tmp_path):
    rows = reviews()
    folder = write_reviews(tmp_path / "toy", rows)
    held_out = {row[:2] for row in rows if row[0] < "u05"} | {rows[-1][:2], rows[-4][:2]}
    split = split_file(tmp_path / "split.npz", sorted(held_out), [rows[-2][:2]])
    users = Users(folder, split=split, domain="target")
    assert {sample.token: sample.text for sample in all_of(users)} == by_hand(rows, 20, 1000, held_out)
    assert all(sample.blank for sample in all_of(users)[:5])
    told = users.describe()
    assert told["held_out_pairs"] == told["held_out_pairs_found"] == told["reviews_held_out"] == len(held_out)
    source = Users(folder, split=split, domain="source")
    assert {sample.token: sample.text for sample in all_of(source)} == by_hand(rows, 20, 1000, {rows[-2][:2]})
    # What the reviews held out say must not matter.
    changed = [(*row[:4], "TELLTALE" if row[:2] in held_out else row[4]) for row in rows]
    again = Users(write_reviews(tmp_path / "changed" / "toy", changed), split=split, domain="target")
    assert all_of(again) == all_of(users)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_a_protocol_holds_out(tmp_path, protocol):
    """Of cold users nothing is left in the target domain, whatever the run's filters dropped."""
    rows = reviews()
    folder = write_reviews(tmp_path / "toy", rows)
    of = {user: [row[:2] for row in rows if row[0] == user] for user in ("u02", "u05", "u07", "u09")}
    listed = [of["u02"][0], of["u05"][-1], of["u07"][0], of["u09"][0], ("u02", "filtered"), ("u99", "i1")]
    parts = [TEST, VALID, UNUSED, FINETUNE, TEST, TEST]
    assert all(len(pairs) > 1 for pairs in of.values())
    split = split_file(tmp_path / "split.npz", listed, protocol=protocol, parts=parts)
    users = Users(folder, split=split, domain="target")
    held_out = set(listed)
    if protocol.startswith("cold"):
        held_out |= {*of["u02"], *of["u05"]}
    assert {sample.token: sample.text for sample in all_of(users)} == by_hand(rows, 20, 1000, held_out)
    told = users.describe()
    assert (told["split_protocol"], told["held_out_pairs"], told["held_out_pairs_found"]) == (protocol, 6, 4)
    assert told["reviews_held_out"] == sum(row[:2] in held_out for row in rows)
    assert told["split_digest"] == SavedSplit.load(split).digest()


def test_the_digest_of_a_split():
    """The same for the same rows in any order and type; another for any other."""
    split = SavedSplit("ratio", np.array(["b", "a"]), np.array(["a", "b", "a"]), np.array(["x", "x", "y"]),
                       np.array([TEST, VALID, TEST]), np.array(["s"]), np.array(["t"]), np.array([VALID]))
    same = SavedSplit("ratio", np.array(["a", "b"], dtype="U9"), np.array(["b", "a", "a"], dtype=object),
                      np.array(["x", "y", "x"]), np.array([VALID, TEST, TEST], dtype=np.int8),
                      np.array(["s"]), np.array(["t"]), np.array([VALID], dtype=np.int8))
    assert split.digest() == same.digest() and len(split.digest()) == 64
    changes = [{"protocol": "benchmark"}, {"linked": np.array(["a"])},
               {"part": np.array([VALID, TEST, TEST])}, {"item": np.array(["y", "y", "x"])},
               {"source_user": np.array(["r"])}, {"source_gone": np.array(["a"])},
               {"target_gone": np.array(["a"])}]
    assert len({split.digest(), *(replace(split, **change).digest() for change in changes)}) == 8


def test_splits_of_other_data(tmp_path):
    folder = write_reviews(tmp_path / "toy", reviews())
    other = split_file(tmp_path / "split.npz", [("stranger", "i1")])
    with pytest.raises(DataError, match="none of the 1 target interactions"):
        Users(folder, split=other, domain="target")
    with pytest.raises(ConfigError, match="--split and --domain go together"):
        Users(folder, split=other)
    with pytest.raises(DataError, match="is not a saved split"):
        Users(folder, split=folder / "toy.reviews.parquet", domain="target")
    source = Users(folder, split=other, domain="source")    # whole under most protocols
    assert source.describe()["reviews_held_out"] == 0


def test_reviews_without_text_user_or_item(tmp_path):
    rows = [("a", "i", 1.0, 1, None), ("a", "j", 1.0, 2, "fine"), ("b", "i", 1.0, 1, None)]
    samples = all_of(Users(write_reviews(tmp_path / "null", rows)))
    assert [(sample.text, sample.blank) for sample in samples] == [("fine", False), ("", True)]
    for number, (place, value) in enumerate([(0, None), (0, ""), (1, None), (1, "")]):
        changed = [*rows, ("c", "j", 1.0, 1, "x")]
        changed[2] = (*changed[2][:place], value, *changed[2][place + 1:])
        with pytest.raises(DataError, match=rf"row 2 \(from 0\) has no {('user_id', 'item_id')[place]}"):
            Users(write_reviews(tmp_path / f"bad{number}", changed))
    pl.read_parquet(tmp_path / "null" / "null.reviews.parquet").clear() \
        .write_parquet(tmp_path / "null" / "null.reviews.parquet")
    with pytest.raises(DataError, match="parquet: has no reviews"):
        Users(tmp_path / "null")


def test_review_files_that_cannot_be_used(tmp_path):
    rows = reviews()
    with pytest.raises(DataError, match="there is no such file"):
        Users(tmp_path)
    scattered = write_reviews(tmp_path / "scattered", [*rows[5:], *rows[:5]][::-1][3:] + rows[:3])
    with pytest.raises(DataError, match="do not stand together"):
        Users(scattered)
    backwards = write_reviews(tmp_path / "backwards", [("u", "i", 1.0, 9, "x"), ("u", "j", 1.0, 8, "y")])
    with pytest.raises(DataError, match="in the order of time"):
        Users(backwards)
    with pytest.raises(DataError, match=r"\{title\} is unknown, there are reviews"):
        Users(write_reviews(tmp_path / "toy", rows), Prompt("{title}", "here"))
    (tmp_path / "bad").mkdir()
    pl.DataFrame({"user_id": ["a"]}).write_parquet(tmp_path / "bad" / "bad.reviews.parquet")
    with pytest.raises(DataError, match="has no column 'item_id', only user_id"):
        Users(tmp_path / "bad")
    (tmp_path / "bad" / "bad.reviews.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a parquet file"):
        Users(tmp_path / "bad")
