"""The split protocols against loops over toy rows, and the file of a saved split."""

import hashlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_mmdiff.data.splits import (
    FINETUNE,
    TEST,
    TRAIN,
    UNUSED,
    VALID,
    Rows,
    SavedSplit,
    check_parts,
    choose,
    choose_share,
    cold_start_items,
    cold_start_users,
    held_out_users,
    warm_start,
)
from recbole_mmdiff.errors import DataError


def toy_rows(seed=0, users=30, items=12, linked=20, times=50):
    """Rows whose linked users stand anywhere among the sorted tokens."""
    draw = np.random.default_rng(seed)
    user_tokens = np.array(sorted(f"p{n}" for n in range(users)))
    item_tokens = np.array(sorted(f"q{n}" for n in range(items)))
    overlap = np.zeros(users, dtype=bool)
    overlap[draw.permutation(users)[:linked]] = True
    pairs = [(u, i) for u in range(users) for i in draw.permutation(items)[:draw.integers(1, 8)]]
    user, item = np.array([pairs[n] for n in draw.permutation(len(pairs))]).T
    return Rows(user, item, user_tokens, item_tokens, overlap, draw.integers(times, size=len(user)))


def slow_choice(tokens, count, seed, purpose):
    """The tokens with the smallest hashes, one at a time."""
    left = [(hashlib.sha256(f"{seed}\0{purpose}\0{t}".encode()).hexdigest(), t) for t in tokens]
    chosen = set()
    for _ in range(count):
        smallest = min(left)
        left.remove(smallest)
        chosen.add(smallest[1])
    return chosen


def slow_users(rows, seed, test_ratio, valid_ratio):
    linked = [token for token, is_linked in zip(rows.user_tokens, rows.overlap, strict=True)
              if is_linked]
    test = slow_choice(linked, round(test_ratio * len(linked)), seed, "test users")
    rest = [token for token in linked if token not in test]
    return test, slow_choice(rest, round(valid_ratio * len(rest)), seed, "valid users")


def row_tokens(rows):
    return [(str(rows.user_tokens[u]), str(rows.item_tokens[i]))
            for u, i in zip(rows.user, rows.item, strict=True)]


@pytest.mark.parametrize("seed", [0, 3])
def test_cold_start_users_equals_a_loop(seed):
    rows = toy_rows(seed)
    test, valid = slow_users(rows, 11, 0.3, 0.25)
    part = cold_start_users(rows, 11, 0.3, 0.25)
    for (user, _), code in zip(row_tokens(rows), part, strict=True):
        assert code == (TEST if user in test else VALID if user in valid else TRAIN)


@pytest.mark.parametrize("times", [50, 2], ids=["few ties", "many ties"])
def test_warm_start_sets_the_earlier_half_aside(times):
    rows = toy_rows(1, times=times)
    test, valid = slow_users(rows, 5, 0.4, 0.2)
    part = warm_start(rows, 5, 0.4, 0.2)
    held = dict.fromkeys(test, TEST) | dict.fromkeys(valid, VALID)
    expected = {}
    for token in map(str, rows.user_tokens):
        own = sorted((int(time), pair) for pair, time in zip(row_tokens(rows), rows.time, strict=True)
                     if pair[0] == token)
        for place, (_, pair) in enumerate(own):
            late = held.get(token, TRAIN)
            expected[pair] = FINETUNE if token in held and place < len(own) // 2 else late
    assert dict(zip(row_tokens(rows), part.tolist(), strict=True)) == expected


def test_warm_start_needs_time():
    rows = toy_rows()
    with pytest.raises(DataError, match="time"):
        warm_start(Rows(rows.user, rows.item, rows.user_tokens, rows.item_tokens, rows.overlap),
                   0, 0.3, 0.2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cold_start_items_equals_a_loop(seed):
    rows = toy_rows(seed)
    test, valid = slow_users(rows, 4, 0.4, 0.3)
    items = [str(token) for token in rows.item_tokens]
    test_items = slow_choice(items, round(0.25 * len(items)), 4, "test items")
    rest = [token for token in items if token not in test_items]
    valid_items = slow_choice(rest, round(0.3 * len(rest)), 4, "valid items")
    part = cold_start_items(rows, 4, 0.4, 0.3, 0.25, 0.3)
    for (user, item), code in zip(row_tokens(rows), part, strict=True):
        if user in test:
            expected = TEST if item in test_items else UNUSED
        elif user in valid:
            expected = VALID if item in valid_items else UNUSED
        else:
            expected = UNUSED if item in test_items | valid_items else TRAIN
        assert code == expected


@pytest.mark.parametrize("protocol", [cold_start_users, warm_start, cold_start_items])
def test_the_order_of_rows_does_not_matter(protocol):
    rows = toy_rows(2, times=3)
    ratios = [0.3, 0.3, 0.25, 0.2][:4 if protocol is cold_start_items else 2]
    shuffled = np.random.default_rng(0).permutation(len(rows.user))
    other = Rows(rows.user[shuffled], rows.item[shuffled], rows.user_tokens, rows.item_tokens,
                 rows.overlap, rows.time[shuffled])
    np.testing.assert_array_equal(protocol(rows, 9, *ratios)[shuffled], protocol(other, 9, *ratios))


@settings(max_examples=50, deadline=None)
@given(st.sets(st.text(st.characters(codec="utf-8"), min_size=1), min_size=2, max_size=30),
       st.integers(0, 2**40), st.data())
def test_choose_is_a_function_of_tokens_and_seed_and_nested(tokens, seed, data):
    tokens = sorted(tokens)
    small, large = sorted(data.draw(st.tuples(*[st.integers(0, len(tokens))] * 2)))
    order = data.draw(st.permutations(range(len(tokens))))
    chosen = {t for t, taken in zip(tokens, choose(np.array(tokens, dtype=object), small, seed, "x"),
                                    strict=True) if taken}
    more = choose(np.array([tokens[n] for n in order], dtype=object), large, seed, "x")
    assert chosen == slow_choice(tokens, small, seed, "x")
    assert chosen <= {tokens[n] for n, taken in zip(order, more, strict=True) if taken}
    assert more.sum() == large


def test_seeds_and_purposes_choose_differently():
    tokens = np.array([f"t{n}" for n in range(200)])
    masks = [choose(tokens, 100, seed, purpose).tobytes()
             for seed in range(4) for purpose in ("test users", "valid users")]
    assert len(set(masks)) == len(masks)


def test_a_known_choice_is_kept_for_ever():
    """Splits of published results must not change with a release."""
    tokens = np.array([f"u{n}" for n in range(8)])
    assert tokens[choose(tokens, 3, 2020, "test users")].tolist() \
        == sorted(slow_choice(tokens, 3, 2020, "test users")) == ["u1", "u6", "u7"]


@pytest.mark.parametrize(("share", "count", "expected"), [(0.2, 10, 2), (0.5, 7, 4), (0.25, 11, 3),
                                                          (0.8, 1001, 801), (0.35, 10, 4)])
def test_shares_are_rounded(share, count, expected):
    tokens = np.array([f"t{n:04}" for n in range(count)])
    assert choose_share(tokens, share, 0, "x", "key").sum() == round(share * count) == expected


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_a_share_outside_of_its_range_names_its_key(share):
    with pytest.raises(DataError, match=r"test_user_ratio.*between 0 and 1"):
        choose_share(np.array(["a", "b"]), share, 0, "x", "test_user_ratio")


@pytest.mark.parametrize(("ratios", "key"), [((0.01, 0.5), "test_user_ratio"),
                                             ((0.99, 0.5), "test_user_ratio"),
                                             ((0.5, 0.01), "valid_user_ratio")])
def test_a_share_that_takes_nobody_or_all_names_its_key(ratios, key):
    with pytest.raises(DataError, match=f"{key}.*empty split"):
        held_out_users(toy_rows(), 0, *ratios)


@pytest.mark.parametrize(("ratios", "key"), [((0.01, 0.2), "test_item_ratio"),
                                             ((0.3, 0.01), "valid_item_ratio")])
def test_the_same_for_items(ratios, key):
    with pytest.raises(DataError, match=f"{key}.*empty split"):
        cold_start_items(toy_rows(), 0, 0.3, 0.3, *ratios)


@pytest.mark.parametrize(("codes", "name"), [([VALID, TEST], "training"), ([TRAIN, TEST], "validation"),
                                             ([TRAIN, VALID, UNUSED], "test")])
def test_an_empty_part_is_named(codes, name):
    with pytest.raises(DataError, match=f"ratio: the {name} split is empty"):
        check_parts(np.array(codes), "ratio")


def saved(**changes):
    values = {"protocol": "warm_start", "linked": np.array(["a", "b"]),
              "user": np.array(["a", "a", "b"]), "item": np.array(["x", "yy", "x"]),
              "part": np.array([TEST, FINETUNE, VALID])}
    return SavedSplit(**(values | changes))


def test_a_saved_split_comes_back(tmp_path):
    saved().save(tmp_path / "split.npz")
    back = SavedSplit.load(tmp_path / "split.npz")
    assert back.protocol == "warm_start"
    for name in ("linked", "user", "item", "part"):
        assert getattr(back, name).tolist() == getattr(saved(), name).tolist()
    users, items = np.array(["b", "c", "a", "a"]), np.array(["x", "x", "yy", "x"])
    assert back.parts(users, items, "split.npz").tolist() == [VALID, TRAIN, FINETUNE, TEST]


def test_pairs_are_told_apart_where_their_letters_agree():
    """("a", "bc") is not ("ab", "c")."""
    split = saved(user=np.array(["a"]), item=np.array(["bc"]), part=np.array([TEST]))
    assert split.parts(np.array(["ab", "a"]), np.array(["c", "bc"]), "f").tolist() == [TRAIN, TEST]


def test_a_saved_split_of_other_data_names_the_pair():
    with pytest.raises(DataError, match=r"split\.npz holds \('a', 'yy'\).*other data"):
        saved().parts(np.array(["a", "b"]), np.array(["x", "x"]), "split.npz")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken" + bytes(40)])
def test_something_else_than_a_saved_split(tmp_path, content):
    (tmp_path / "split.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"split_file: .*split\.npz is not a saved split"):
        SavedSplit.load(tmp_path / "split.npz")


def test_a_truncated_or_damaged_saved_split(tmp_path):
    path = tmp_path / "split.npz"
    saved(user=np.array([f"u{n}" for n in range(300)]), item=np.array(["x"] * 300),
          part=np.full(300, TEST)).save(path)
    whole, expected = path.read_bytes(), SavedSplit.load(path)
    for content in (whole[:len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not a saved split"):
            SavedSplit.load(path)
    noticed = 0
    for place in range(0, len(whole), 41):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1:])
        try:
            back = SavedSplit.load(path)
        except DataError:
            noticed += 1
        else:
            assert back.user.tolist() == expected.user.tolist()
            assert back.part.tolist() == expected.part.tolist()
    assert noticed > 10


def test_a_saved_split_with_an_array_missing_or_of_objects(tmp_path):
    path = tmp_path / "split.npz"
    np.savez(path, protocol=np.str_("ratio"), linked=np.array(["a"]))
    with pytest.raises(DataError, match="is not a saved split"):
        SavedSplit.load(path)
    buffer = io.BytesIO()
    np.savez(buffer, protocol=np.str_("ratio"), linked=np.array([object()]),
             user=np.array(["a"]), item=np.array(["x"]), part=np.array([2]))
    path.write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="is not a saved split"):
        SavedSplit.load(path)


@pytest.mark.parametrize("letter", [0x110000, 2**32 - 1, 0xD800])
@pytest.mark.parametrize("kind", ["<u4", ">u4"])
def test_a_saved_split_of_letters_that_are_none(tmp_path, letter, kind):
    """Python ends in a SystemError when it makes a string of them."""
    path = tmp_path / "split.npz"
    saved().save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    user = np.array([97, letter, 98], dtype=kind).view(f"{kind[0]}U1")
    np.savez(path, **{**arrays, "user": user})
    with pytest.raises(DataError, match=r"is not a saved split \(user is no array of numbers or text"):
        SavedSplit.load(path)


def test_a_missing_saved_split(tmp_path):
    with pytest.raises(DataError, match=r"split_file: there is no file .*none\.npz"):
        SavedSplit.load(tmp_path / "none.npz")


@pytest.mark.parametrize("changes", [
    {"protocol": "x"}, {"protocol": np.array(["ratio"])}, {"user": np.array(["a"])},
    {"part": np.array([7, 2, 1])}, {"part": np.array(["a", "b", "c"])}, {"part": np.array([[1], [2], [1]])},
    {"linked": np.array([1.5])}, {"item": np.zeros(3, dtype=[("a", "i4")])}, {"source_user": np.array(["a"])},
    {"linked": np.array("a")}])
def test_a_saved_split_whose_arrays_do_not_belong_together(tmp_path, changes):
    path = tmp_path / "split.npz"
    saved().save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(path, **{**arrays, **changes})
    with pytest.raises(DataError, match=r"split_file: .*split\.npz is not a saved split \("):
        SavedSplit.load(path)
