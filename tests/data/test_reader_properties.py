"""Readers of tables, for any tokens: what was written is read, and what is broken is named by its line."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recbole_mmdiff.data.atomic import read_atomic, read_header
from recbole_mmdiff.data.text_form import read_text_form
from recbole_mmdiff.data.users import link_users
from recbole_mmdiff.errors import DataError

#: what may stand in a cell: anything but what ends it or its line
TOKENS = st.text(st.characters(codec="utf-8", exclude_characters="\t\n\r"), min_size=1, max_size=8) \
    | st.sampled_from(["NA", "null", "nan", "007", "1e5", "1.0", "True", '"', "'", "#", " ", "a b", "[PAD]"])
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
NUMBERS_32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
COLUMNS = {"user_id": "token", "item_id": "token", "rating": "float", "title": "token_seq"}
ROWS = st.lists(st.fixed_dictionaries({"user_id": TOKENS, "item_id": TOKENS, "rating": NUMBERS,
                                       "title": st.just("") | TOKENS}), min_size=1, max_size=6)
REQUIRED = {"user_id", "item_id", "rating"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("reader") / "d.inter"


def write(path, order, rows, end="\n"):
    lines = [[f"{name}:{COLUMNS[name]}" for name in order]]
    lines += [[repr(row[name]) if name == "rating" else row[name] for name in order] for row in rows]
    path.write_bytes("".join("\t".join(line) + end for line in lines).encode())




@settings(max_examples=40)
@given(ROWS, st.permutations(list(COLUMNS)), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_a_table_is_read_as_it_was_written(path, rows, order, end, as_categories):
    write(path, order, rows, end)
    frame = read_atomic(path, None, REQUIRED, categories=("user_id", "item_id") if as_categories else ())
    assert list(frame) == order == [column.name for column in read_header(path, "\t", "utf-8")]
    for name in order:
        found = [None if value != value else value for value in frame[name].tolist()]
        assert found == [row[name] if row[name] != "" else None for row in rows], name


@settings(max_examples=40)
@given(ROWS, st.permutations(list(COLUMNS)), st.data())
def test_a_fault_is_named_with_its_line(path, rows, order, data):
    write(path, order, rows)
    lines = path.read_text(encoding="utf-8").split("\n")
    place = data.draw(st.integers(0, len(rows) - 1)) + 1
    cells = lines[place].split("\t")
    name = data.draw(st.sampled_from(sorted(REQUIRED)))
    fault = data.draw(st.sampled_from(["a cell more", "a cell less", "empty", "no number"]))
    if fault in ("a cell more", "a cell less"):
        cells = [*cells, "x"] if fault == "a cell more" else cells[1:]
    else:
        name = name if fault == "empty" else "rating"
        word = data.draw(st.sampled_from(["x", "inf", "nan", "1_0"]))
        cells[order.index(name)] = "" if fault == "empty" else word
    lines[place] = "\t".join(cells)
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    with pytest.raises(DataError, match=rf"d\.inter, line {place + 1}: "):
        read_atomic(path, None, REQUIRED)


@settings(max_examples=40)
@given(st.dictionaries(TOKENS, st.tuples(*[NUMBERS_32] * 3), min_size=1, max_size=6), st.booleans())
def test_features_as_text_are_read_as_they_were_written(path, rows, token_first):
    rows = {token: row for token, row in rows.items() if token.strip()}
    if not rows:
        return
    lines = [("item_id:token", "emb:float_seq")]
    lines += [(token, " ".join(map(repr, row))) for token, row in rows.items()]
    order = 1 if token_first else -1
    path.write_bytes("".join("\t".join(line[::order]) + "\n" for line in lines).encode())
    tokens, matrix = read_text_form(path)
    assert tokens == list(rows)
    np.testing.assert_array_equal(matrix, np.array(list(rows.values()), dtype=np.float32))


@settings(max_examples=40)
@given(st.lists(TOKENS, min_size=1, max_size=6, unique=True), st.randoms(use_true_random=False))
@example(["a\u2028b", "c\x85", "d\x1c", "e\x0b"], None)
def test_links_are_read_as_they_were_written(path, tokens, shuffle):
    """Also with tokens that hold what ends a line for Python, but not for the tables beside them."""
    others = [f"t{number}" for number in range(len(tokens))]
    if shuffle is not None:
        shuffle.shuffle(others)
    pairs = list(zip(tokens, others, strict=True))
    path.write_bytes("".join("\t".join(pair) + "\n" for pair in [("source", "target"), *pairs]).encode())
    links = link_users(np.array(sorted(tokens)), np.array(sorted(others)), str(path))
    assert [tuple(pair) for pair in links.tolist()] == sorted(pairs, key=lambda pair: pair[1])
