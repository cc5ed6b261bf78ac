"""The feature store: keyed by token, memory-mapped, strict, never unpickling."""

import hashlib
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from recbole_mmdiff.data.features import (
    Coverage,
    FeatureError,
    FeatureFile,
    feature_path,
    find_modalities,
    write_features,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared" / "data"
TOKENS = ["b", "a", "é x", "10", "c\u2028d", "unused"]


def matrix(rows=6, dim=3, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(dtype)


@pytest.fixture
def stored(tmp_path):
    return write_features(tmp_path, "toy", "text", TOKENS, matrix(), encoder="random")


def path_of(stored, suffix):
    return feature_path(stored.folder, "toy", "text", suffix)


def reopen(stored):
    return FeatureFile.open(stored.folder, "toy", "text")


def edit_manifest(stored, **changes):
    path = path_of(stored, "json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Writing and opening


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_round_trip(tmp_path, dtype, order):
    values = np.asarray(matrix(dtype=dtype), order=order)
    write_features(tmp_path, "toy.v2", "text", TOKENS, values, encoder="random", pooling="mean")
    feature = FeatureFile.open(tmp_path, "toy.v2", "text")
    feature.verify()
    np.testing.assert_array_equal(feature.matrix, values)
    assert feature.tokens == tuple(TOKENS)
    assert isinstance(feature.matrix, np.memmap)
    assert not feature.matrix.flags.writeable
    assert feature.matrix.flags.c_contiguous
    assert feature.manifest["encoder"] == "random"
    assert feature.manifest["pooling"] == "mean"
    assert feature.manifest["rows"] == 6
    assert feature.manifest["dim"] == 3
    assert feature.manifest["modality"] == "text"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"toy.v2.text.{end}" for end in ("json", "npy", "tokens")
    ]


def test_overwriting_replaces_all_three(stored):
    write_features(stored.folder, "toy", "text", ["z"], matrix(1, 2))
    again = reopen(stored)
    again.verify()
    assert again.tokens == ("z",)
    assert again.matrix.shape == (1, 2)


def test_interrupted_overwrite_counts_as_unfinished(stored, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        write_features(stored.folder, "toy", "text", ["z"], matrix(1, 2))
    assert find_modalities(stored.folder, "toy") == []
    with pytest.raises(FeatureError, match=r"lacks toy\.text\.json"):
        reopen(stored)
    assert not list(stored.folder.glob(".*"))


def test_find_modalities_ignores_other_datasets_and_files(stored):
    folder = stored.folder
    write_features(folder, "toy", "image", ["a"], matrix(1))
    write_features(folder, "toy.v2", "audio", ["a"], matrix(1))
    (folder / "toy.prep.json").write_text("{}")
    assert find_modalities(folder, "toy") == ["image", "text"]
    assert find_modalities(folder, "toy.v2") == ["audio"]
    assert find_modalities(folder / "absent", "toy") == []


def bad_value(value):
    values = matrix()
    values[2, 1] = value
    return values


@pytest.mark.parametrize(
    ("tokens", "values", "message"),
    [
        (TOKENS[:5], matrix(), "6 rows, but .* 5 tokens"),
        ([*TOKENS[:5], "a"], matrix(), "'a' appears twice .*row 5"),
        ([*TOKENS[:5], ""], matrix(), "row 5 is empty"),
        ([*TOKENS[:5], "x\ny"], matrix(), "breaks the line"),
        ([*TOKENS[:5], 7], matrix(), r"token 5 is 7 \(int\); tokens are strings"),
        (TOKENS, bad_value(np.nan), "token 'é x' holds NaN or Inf"),
        (TOKENS, bad_value(-np.inf), "token 'é x' holds NaN or Inf"),
        (TOKENS, matrix(dtype=np.float64), "dtype float64; float16 or float32 is accepted"),
        (TOKENS, np.ones((6, 2), dtype=np.int64), "dtype int64"),
        (TOKENS, np.array([[object()]] * 6), "dtype object"),
        (TOKENS, np.ones(6, dtype=np.float32), r"shape \(6,\)"),
        ([], np.ones((0, 3), dtype=np.float32), r"shape \(0, 3\)"),
    ],
)
def test_write_refuses_and_leaves_nothing(tmp_path, tokens, values, message):
    with pytest.raises(FeatureError, match=message):
        write_features(tmp_path, "toy", "text", tokens, values)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("manifest", "message"),
    [({"sha256": "0"}, "'sha256' is computed"), ({"args": {1, 2}}, "plain JSON")],
)
def test_write_refuses_a_bad_manifest_before_touching_files(stored, manifest, message):
    with pytest.raises(FeatureError, match=message):
        write_features(stored.folder, "toy", "text", TOKENS, matrix(), **manifest)
    reopen(stored).verify()


@pytest.mark.parametrize(("dataset", "modality"), [("toy", "a.b"), ("toy", "../x"), ("a/b", "x")])
def test_names_that_are_no_file_names_are_refused(tmp_path, dataset, modality):
    with pytest.raises(FeatureError, match="not a usable name"):
        FeatureFile.open(tmp_path, dataset, modality)


# Damaged files


def test_missing_feature_names_what_there_is(stored):
    with pytest.raises(FeatureError, match=r"'image' of 'toy' lacks .*finished here: text"):
        FeatureFile.open(stored.folder, "toy", "image")


@pytest.mark.parametrize("size", [0, 5, 100, 140])
def test_truncated_matrix(stored, size):
    path = path_of(stored, "npy")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FeatureError, match=r"text\.npy: not a complete \.npy matrix"):
        reopen(stored)


@pytest.mark.parametrize("header", ["{'descr': '<f4', 'shape': (6,", "{'descr': ('<f4", "{", "3", "'"])
def test_a_matrix_whose_header_does_not_end(stored, header):
    length = len(header).to_bytes(2, "little")
    path_of(stored, "npy").write_bytes(b"\x93NUMPY\x01\0" + length + header.encode())
    with pytest.raises(FeatureError, match=r"\.npy: not a complete \.npy matrix"):
        reopen(stored)


def test_matrix_with_a_tail(stored):
    with path_of(stored, "npy").open("ab") as file:
        file.write(b"0")
    with pytest.raises(FeatureError, match="201 bytes where its header says 200"):
        reopen(stored)


class Bomb:
    exploded = False

    def __reduce__(self):
        return setattr, (Bomb, "exploded", True)


@pytest.mark.parametrize("form", ["object array", "bare pickle", "zip"])
def test_pickles_and_archives_are_never_read(stored, form):
    with path_of(stored, "npy").open("wb") as file:
        if form == "object array":
            np.save(file, np.array([[Bomb()]] * 6), allow_pickle=True)
        elif form == "bare pickle":
            pickle.dump(Bomb(), file)
        else:
            np.savez(file, matrix())
    with pytest.raises(FeatureError, match="never read"):
        reopen(stored)
    assert not Bomb.exploded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 5}, "rows is 5, but the files have 6"),
        ({"dim": 4}, "dim is 4, but the files have 3"),
        ({"dtype": "float16"}, "dtype is 'float16', but the files have 'float32'"),
        ({"modality": "image"}, "describes the modality 'image', not 'text'"),
    ],
)
def test_manifest_that_does_not_match(stored, changes, message):
    edit_manifest(stored, **changes)
    with pytest.raises(FeatureError, match=message):
        reopen(stored)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a JSON file"), ("[]", "JSON object, not list"), ('{"rows": 6}', "lacks .*sha256"),
     ("[" * 100_000, "not a JSON file")],
)
def test_unusable_manifest(stored, text, message):
    path_of(stored, "json").write_text(text)
    with pytest.raises(FeatureError, match=message):
        reopen(stored)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"b\na\n", "6 rows, but toy.text.tokens has 2 tokens"),
        (b"b\na\nx\ny\nz\na\n", "'a' appears twice"),
        (b"b\na\nx\n\nz\nv\n", "row 3 is empty"),
        (b"b\n\xff\xfe\n", "not UTF-8"),
        ("\n".join(sorted(TOKENS)).encode(), "tokens_sha256"),
    ],
)
def test_damaged_tokens(stored, content, message):
    path_of(stored, "tokens").write_bytes(content)
    with pytest.raises(FeatureError, match=message):
        reopen(stored)


def test_tokens_saved_by_an_editor_stay_the_same_tokens(stored):
    text = "\ufeff" + "\r\n".join(TOKENS)
    path_of(stored, "tokens").write_bytes(text.encode("utf-8"))
    assert reopen(stored).tokens == tuple(TOKENS)


def test_content_is_checked_only_by_verify(stored):
    path = path_of(stored, "npy")
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    feature = reopen(stored)
    with pytest.raises(FeatureError, match="sha256 is"):
        feature.verify()
    edit_manifest(stored, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(FeatureError, match="token 'unused' holds NaN"):
        reopen(stored).verify()
    with pytest.raises(FeatureError, match="token 'unused' holds NaN"):
        reopen(stored).align(["[PAD]", "unused"])
    assert reopen(stored).align(["[PAD]", "a"]).matrix.shape == (2, 3)


# Alignment


def slow_align(feature, tokens, policy):
    """Token by token, with the mean of the rows found in plain Python."""
    rows = dict(zip(feature.tokens, feature.matrix.astype(np.float64), strict=True))
    found = [rows[token] for token in tokens[1:] if token in rows]
    fill = sum(found) / len(found) if policy == "mean" else np.zeros(feature.matrix.shape[1])
    body = [rows.get(token, fill) for token in tokens[1:]]
    return np.array([np.zeros(feature.matrix.shape[1]), *body])


@pytest.mark.parametrize("policy", ["mean", "zero", "drop_item"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 24])
def test_align_by_token_equals_a_slow_loop(tmp_path, monkeypatch, policy, dtype, block_bytes):
    monkeypatch.setattr("recbole_mmdiff.data.feature_files.BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(1)
    names = [f"item{i}" for i in range(40)]
    feature = write_features(tmp_path, "toy", "text", names, matrix(40, 5, dtype))
    tokens = ["[PAD]", *rng.permutation([*names[:30], *(f"new{i}" for i in range(10))])]
    aligned = feature.align(tokens, policy)
    assert aligned.matrix.dtype == np.float32
    np.testing.assert_allclose(aligned.matrix, slow_align(feature, tokens, policy), rtol=1e-6)
    assert aligned.missing.dtype == bool
    assert aligned.missing.tolist() == [t.startswith("new") for t in tokens]
    assert list(aligned.missing_tokens) == [t for t in tokens if t.startswith("new")]


def test_row_order_of_the_file_does_not_matter(tmp_path):
    values, order = matrix(), np.random.default_rng(3).permutation(len(TOKENS))
    shuffled = [TOKENS[i] for i in order]
    one = write_features(tmp_path, "one", "text", TOKENS, values)
    two = write_features(tmp_path, "two", "text", shuffled, values[order])
    wanted = np.array(["[PAD]", "10", "b", "é x", "a", "c\u2028d", "none"], dtype=object)
    np.testing.assert_array_equal(
        one.align(wanted, "zero").matrix, two.align(wanted, "zero").matrix
    )


def test_error_policy(stored):
    tokens = ["[PAD]", "a", *(f"new{i}" for i in range(9))]
    with pytest.raises(
        FeatureError, match=r"9 of 10 tokens have no row, first new0, .*new4, \.\.\.;"
    ):
        stored.align(tokens, "error")
    aligned = stored.align(["[PAD]", "a", "b"], "error")
    assert not aligned.missing.any()
    assert aligned.missing_tokens == ()


@pytest.mark.parametrize("policy", ["mean", "zero", "drop_item", "error"])
def test_a_file_of_another_dataset_is_refused(stored, policy):
    with pytest.raises(FeatureError, match=r"none of the 2 tokens .*has B1, B2, .*has b, a, é x"):
        stored.align(["[PAD]", "B1", "B2"], policy)


@pytest.mark.parametrize(
    ("tokens", "policy", "message"),
    [
        (["a", "b"], "mean", r"start with '\[PAD\]', not 'a'"),
        ([], "mean", "not nothing"),
        (["[PAD]", 10], "mean", r"token 1 is 10 \(int\)"),
        (["[PAD]", "a"], "median", "'median' is unknown; choose one of mean, zero"),
    ],
)
def test_align_refuses_misuse(stored, tokens, policy, message):
    with pytest.raises(FeatureError, match=message):
        stored.align(tokens, policy)


def test_pad_is_zero_even_if_the_file_has_it(tmp_path):
    feature = write_features(tmp_path, "toy", "text", ["[PAD]", "a"], np.ones((2, 2), np.float32))
    aligned = feature.align(["[PAD]", "a", "b"])
    np.testing.assert_array_equal(aligned.matrix, [[0, 0], [1, 1], [1, 1]])
    assert aligned.missing.tolist() == [False, False, True]
    assert feature.align(["[PAD]"]).matrix.shape == (1, 2)


def test_coverage(stored):
    coverage = stored.coverage(["[PAD]", "a", "x", "b", "y"])
    assert coverage == Coverage(found=2, total=4, first_missing=("x", "y"))
    assert str(coverage) == "2 of 4 tokens have features (50.0%); first missing: x, y"
    assert str(stored.coverage(["[PAD]", "a"])) == "1 of 1 tokens have features (100.0%)"
    assert str(stored.coverage(["[PAD]"])) == "0 of 0 tokens have features (100.0%)"
    assert len(stored.coverage(["[PAD]", *map(str, range(100, 200))]).first_missing) == 5


# Scale and the outside world

_OPEN_LARGE = """
import resource, sys, time
from recbole_mmdiff.data.features import FeatureFile
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, start = memory(), time.perf_counter()
feature = FeatureFile.open(sys.argv[1], "big", "text")
print(time.perf_counter() - start, memory() - before, feature.matrix.shape[0])
assert not {"torch", "recbole", "pandas"} & set(sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in Linux's unit")
def test_large_file_opens_quickly_in_little_memory(tmp_path):
    rows, dim = 100_000, 4096
    path = feature_path(tmp_path, "big", "text", "npy")
    # A hole in the file: 800 MB by its size, nothing on the disk.
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, dim))
    path.with_suffix(".tokens").write_text("".join(f"item{i}\n" for i in range(rows)))
    manifest = {"rows": rows, "dim": dim, "dtype": "float16", "sha256": ""}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    command = [sys.executable, "-c", _OPEN_LARGE, str(tmp_path)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    seconds, kilobytes, found = map(float, run.stdout.split())
    assert found == rows
    assert seconds < 1
    assert kilobytes < 100 * 1024
    feature = FeatureFile.open(tmp_path, "big", "text")
    start = time.perf_counter()
    assert feature.align(["[PAD]", "item99999", "item0"]).matrix.shape == (3, dim)
    assert time.perf_counter() - start < 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared development data are absent")
def test_shared_data_open_and_verify():
    manifests = list(SHARED.glob("*/*.json"))
    assert manifests
    for path in manifests:
        dataset, modality, _ = path.name.split(".")
        assert modality in find_modalities(path.parent, dataset)
        FeatureFile.open(path.parent, dataset, modality).verify()
