"""The split protocols for any interactions, ratios and seeds; a saved split for any tokens."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recbole_mmdiff.data.splits import (
    FINETUNE,
    TEST,
    TRAIN,
    UNUSED,
    VALID,
    Rows,
    SavedSplit,
    cold_start_items,
    cold_start_users,
    held_out_users,
    warm_start,
)
from recbole_mmdiff.errors import DataError

TOKENS = st.text(st.characters(codec="utf-8", exclude_characters="\0\t\n\r"), min_size=1, max_size=5)
RATIOS = st.floats(0.05, 0.95)
PROTOCOLS = {cold_start_users: 2, warm_start: 2, cold_start_items: 4}


@st.composite
def interactions(draw):
    """Rows of some users and items, at least three of whom are linked."""
    users = sorted(draw(st.sets(TOKENS, min_size=4, max_size=12)))
    items = sorted(draw(st.sets(TOKENS, min_size=4, max_size=8)))
    pairs = draw(st.lists(st.tuples(st.integers(0, len(users) - 1), st.integers(0, len(items) - 1)),
                          min_size=1, max_size=40, unique=True))
    linked = draw(st.sets(st.integers(0, len(users) - 1), min_size=3))
    user, item = np.array(pairs).T
    overlap = np.isin(np.arange(len(users)), list(linked))
    time = np.array(draw(st.lists(st.integers(0, 5), min_size=len(pairs), max_size=len(pairs))))
    return Rows(user, item, np.array(users, dtype=object), np.array(items, dtype=object), overlap, time)


def divided(protocol, rows, seed, ratios):
    """The parts, where the ratios leave nobody without a part."""
    try:
        return protocol(rows, seed, *ratios[:PROTOCOLS[protocol]])
    except DataError as error:
        assert "empty split" in str(error)
        assume(False)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@settings(max_examples=30)
@given(rows=interactions(), seed=st.integers(0, 2**40), ratios=st.tuples(*[RATIOS] * 4), data=st.data())
def test_parts(protocol, rows, seed, ratios, data):
    """Every row has one part; held-out users have the promised number, are linked, and are out of training;
    the order of the rows, and other users that nobody is linked to, change nothing."""
    part = divided(protocol, rows, seed, ratios)
    linked = int(rows.overlap.sum())
    tested, validated = held_out_users(rows, seed, *ratios[:2])
    assert tested.sum() == round(ratios[0] * linked)
    assert validated.sum() == round(ratios[1] * (linked - tested.sum()))
    assert not (tested & validated).any() and rows.overlap[tested | validated].all()
    held_out = (tested | validated)[rows.user]
    assert not held_out[part == TRAIN].any()
    assert tested[rows.user[part == TEST]].all() and validated[rows.user[part == VALID]].all()
    if protocol is cold_start_items:
        cold = set(rows.item[np.isin(part, (VALID, TEST))].tolist())
        assert not cold & set(rows.item[part == TRAIN].tolist())
        assert not set(rows.item[part == TEST].tolist()) & set(rows.item[part == VALID].tolist())
    else:
        assert (part != UNUSED).all() and ((part == TRAIN) == ~held_out).all()
    if protocol is warm_start:
        for user in np.flatnonzero(tested | validated):
            own, early = rows.user == user, rows.time[(rows.user == user) & (part == FINETUNE)]
            assert len(early) == own.sum() // 2
            assert not len(early) or early.max() <= rows.time[own & (part != FINETUNE)].min()
    order = np.array(data.draw(st.permutations(range(len(part)))))
    shuffled = Rows(rows.user[order], rows.item[order], rows.user_tokens, rows.item_tokens, rows.overlap,
                    rows.time[order])
    np.testing.assert_array_equal(divided(protocol, shuffled, seed, ratios), part[order])
    wider = Rows(rows.user, rows.item, np.append(rows.user_tokens, "\U0010ffff\U0010ffff"), rows.item_tokens,
                 np.append(rows.overlap, False), rows.time)
    np.testing.assert_array_equal(divided(protocol, wider, seed, ratios), part)


@settings(max_examples=25)
@given(st.lists(st.tuples(TOKENS, TOKENS, st.integers(TRAIN, UNUSED)), min_size=1, max_size=12,
                unique_by=lambda row: row[:2]), st.lists(TOKENS, max_size=4), st.data())
def test_a_saved_split_comes_back(tmp_path_factory, rows, linked, data):
    path = tmp_path_factory.getbasetemp() / "split.npz"
    user, item, part = (np.array(column) for column in zip(*rows, strict=True))
    split = SavedSplit("warm_start", np.array(linked, dtype=str), user, item, part)
    split.save(path)
    back = SavedSplit.load(path)
    assert back.equals(split) and back.digest() == split.digest()
    np.testing.assert_array_equal(back.parts(user, item, path), part)
    order = np.array(data.draw(st.permutations(range(len(rows)))))
    other = SavedSplit("warm_start", np.array(linked, dtype=str), user[order], item[order], part[order])
    assert other.digest() == split.digest()
    changed = SavedSplit("warm_start", np.array(linked, dtype=str), user, item, (part + 1) % (UNUSED + 1))
    assert changed.digest() != split.digest()
