"""Stores for any contents: what is written is read back, and a kill leaves the old or the new."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dataset_prep.batches import Encoded
from dataset_prep.shards import Plan, Work
from recbole_mmdiff.data.features import FeatureError, FeatureFile, write_features
from recbole_mmdiff.data.splits import SavedSplit
from recbole_mmdiff.storage import load_plain, save_plain

TOKENS = st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1, max_size=6)
DTYPES = st.sampled_from([np.float16, np.float32])
KINDS = st.sampled_from([bool, np.int8, np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64,
                         np.complex64, ">i4", "<U3"])


@st.composite
def features(draw, max_rows=5):
    """Tokens, and as many finite rows of a dtype that is accepted."""
    tokens = draw(st.lists(TOKENS, min_size=1, max_size=max_rows, unique=True))
    shape, dtype = (len(tokens), draw(st.integers(1, 4))), draw(DTYPES)
    finite = {"allow_nan": False, "allow_infinity": False, "width": np.dtype(dtype).itemsize * 8}
    return tokens, draw(arrays.arrays(dtype, shape, elements=st.floats(**finite)))


@settings(max_examples=30)
@given(features(), st.randoms(use_true_random=False))
def test_features_come_back_by_token(tmp_path_factory, feature, shuffle):
    tokens, matrix = feature
    folder = tmp_path_factory.getbasetemp()
    write_features(folder, "d", "text", tokens, matrix, encoder="test")
    file = FeatureFile.open(folder, "d", "text")
    file.verify()
    assert list(file.tokens) == tokens and file.matrix.dtype == matrix.dtype
    np.testing.assert_array_equal(file.matrix, matrix)
    known = [token for token in tokens if token != "[PAD]"]
    asked = ["[PAD]", *shuffle.sample(known, len(known)), "nobody has this one"]
    if known:
        aligned = file.align(asked, "zero")
        assert aligned.missing.tolist() == [False] * len(asked[:-1]) + [True]
        for token, row in zip(asked[1:-1], aligned.matrix[1:], strict=False):
            np.testing.assert_array_equal(row, matrix[tokens.index(token)].astype(np.float32))


@settings(max_examples=30)
@given(st.recursive(
    st.integers() | st.text() | st.binary(max_size=5)
    | arrays.arrays(KINDS, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=6))
def test_any_state_comes_back_from_its_file(tmp_path_factory, state):
    path = tmp_path_factory.getbasetemp() / "state.pth"
    save_plain({"state": state, "tensors": torch.ones(2)}, path)
    assert_same(load_plain(path)["state"], state)


def assert_same(found, state):
    """Equal, to the kinds of numbers and the shapes of arrays."""
    if isinstance(state, np.ndarray):
        assert isinstance(found, np.ndarray) and found.shape == state.shape
        assert found.dtype == state.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, state)
    elif isinstance(state, (dict, list)):
        assert type(found) is type(state) and len(found) == len(state)
        for key in state if isinstance(state, dict) else range(len(state)):
            assert_same(found[key], state[key])
    else:
        assert type(found) is type(state) and found == state


@settings(max_examples=15)
@given(st.lists(TOKENS, min_size=1, max_size=7, unique=True), st.integers(1, 4), st.data())
def test_shards_become_the_feature(tmp_path_factory, tokens, size, data):
    """In whatever pieces, finished in whatever order, with whatever inputs left out."""
    folder = tmp_path_factory.mktemp("shards")
    matrix = np.arange(3.0 * len(tokens)).reshape(-1, 3)
    work = Work(folder, "text", Plan({"encoder": "test"}, tokens, size, "float32"))
    work.folder.mkdir()
    work.prepare(restart=False)
    without = data.draw(st.sets(st.integers(1, len(tokens)), max_size=len(tokens) - 1))
    for shard in data.draw(st.permutations(range(work.plan.shards))):
        start, stop = work.plan.bounds(shard)
        rows = np.array([row for row in range(stop - start) if start + row not in without], dtype=np.int64)
        left_out = {row: "no text" for row in range(stop - start) if start + row in without}
        work.save(shard, Encoded(rows, matrix[start + rows], left_out, 0))
    assert work.finished() == list(range(work.plan.shards))
    feature = work.merge({})
    kept = [row for row in range(len(tokens)) if row not in without]
    assert list(feature.tokens) == [tokens[row] for row in kept]
    np.testing.assert_array_equal(feature.matrix, matrix[kept].astype(np.float32))
    left_out = sum(entry["count"] for entry in feature.manifest["left_out"].values())
    assert left_out == len(tokens) - len(kept)


# ---- kills --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill at the worst moment."""


@pytest.fixture
def killing(monkeypatch):
    """``killing(count)``: the process ends before its ``count``-th file takes its place."""
    replace = os.replace

    def kill(count):
        left = iter(range(count, -1, -1))

        def replace_or_die(*names):
            if next(left) == 0:
                raise Killed
            replace(*names)

        monkeypatch.setattr(os, "replace", replace_or_die)

    return kill


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_killed_feature_is_old_unfinished_or_new(tmp_path, killing, count):
    """Never the tokens of one beside the rows of another."""
    old, new = np.zeros((2, 3), dtype=np.float32), np.ones((2, 3), dtype=np.float32)
    write_features(tmp_path, "d", "text", ["a", "b"], old)
    killing(count)
    with pytest.raises(Killed):
        write_features(tmp_path, "d", "text", ["b", "c"], new)
    with pytest.raises(FeatureError, match=r"lacks d\.text\.json"):
        FeatureFile.open(tmp_path, "d", "text")


def test_a_killed_split_or_state_is_the_old_one(tmp_path, killing):
    def split(user):
        return SavedSplit("ratio", *[np.array([user])] * 3, np.array([1]))

    split("a").save(tmp_path / "split.npz")
    save_plain({"epoch": 1}, tmp_path / "state.pth")
    killing(0)
    with pytest.raises(Killed):
        split("b").save(tmp_path / "split.npz")
    killing(0)
    with pytest.raises(Killed):
        save_plain({"epoch": 2}, tmp_path / "state.pth")
    assert SavedSplit.load(tmp_path / "split.npz").equals(split("a"))
    assert load_plain(tmp_path / "state.pth") == {"epoch": 1}
    assert sorted(os.listdir(tmp_path)) == ["split.npz", "state.pth"]
