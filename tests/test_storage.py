"""Files that are never half written and never run code."""

import os
import pickle
import random
import subprocess
import sys
from collections import OrderedDict, defaultdict
from enum import Enum

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from recbole_mmdiff.errors import WriteError
from recbole_mmdiff.files import remove_leftovers
from recbole_mmdiff.storage import (
    TAG,
    CheckpointError,
    from_plain,
    load_plain,
    save_plain,
    to_plain,
    write_atomically,
)

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class Colour(Enum):
    RED = 1


def round_trip(state, folder):
    save_plain(state, folder / "state.pth")
    return load_plain(folder / "state.pth")


def test_written_file_replaces_the_old_one_and_keeps_its_name(tmp_path):
    target = tmp_path / "result.npy"
    target.write_text("old")
    with write_atomically(target) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".npy"
        np.save(temporary, np.arange(3))
        assert target.read_text() == "old"
    assert np.load(target).tolist() == [0, 1, 2]
    assert os.listdir(tmp_path) == ["result.npy"]


def test_failure_keeps_the_old_file_and_removes_the_temporary(tmp_path):
    target = tmp_path / "result.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), write_atomically(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.txt"]


def test_nothing_written_or_no_folder_is_an_error(tmp_path):
    with pytest.raises(WriteError, match=r"a: cannot be written .*No such file"), \
            write_atomically(tmp_path / "a"):
        pass
    with (
        pytest.raises(WriteError, match=r"none.a: cannot be written .*check that its folder is there"),
        write_atomically(tmp_path / "none" / "a") as temporary,
    ):
        temporary.write_text("x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("names", "gone"), [
    (None, {"b.text.npy", "plain", "c.json"}), ({"b.text.npy", "plain"}, {"b.text.npy", "plain"}),
    ({"text.npy"}, set())])
def test_leftovers_of_killed_writers_are_removed_and_nothing_else(names, gone, tmp_path):
    killed = {}
    for name in ("b.text.npy", "plain", "c.json"):
        with write_atomically(tmp_path / name) as temporary:
            temporary.write_text("half")
            killed[name] = temporary.name
    others = [*killed, ".lock", ".c.0123.tmp.json", "c.0123456789ab.tmp.json", ".c.0123456789ab.json"]
    for name in [*others, *killed.values()]:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, names)
    assert set(os.listdir(tmp_path)) == {*others, *(killed[name] for name in killed.keys() - gone)}


@pytest.mark.skipif(os.name != "posix", reason="links and modes are POSIX")
def test_links_are_followed_and_modes_are_the_usual_ones(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with write_atomically(str(tmp_path / "link")) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_killed_writer_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "model.pth"
    save_plain({"epoch": 1}, path)
    code = (
        "import os, signal, sys, torch; from recbole_mmdiff import storage\n"
        "def die(*a): a[1].write(b'half'); a[1].flush(); os.kill(os.getpid(), 9)\n"
        "torch.save = die\n"
        "storage.save_plain({'epoch': 2}, sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=ENVIRONMENT, check=False)
    assert done.returncode != 0
    assert load_plain(path) == {"epoch": 1}


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3),
        np.float32(1.5) * np.ones(2, np.float32),
        np.array(3.0),
        np.zeros((0, 4), np.float16),
        np.array([True, False]),
        np.arange(8)[::-2],
        np.arange(6).reshape(2, 3).T,
        np.arange(3, dtype=">i4"),
        np.broadcast_to(np.float64(2.0), (2, 2)),
        np.array([["[PAD]", "u1"], ["ü", ""]]),
        np.zeros((0, 2), "U3"),
        np.array([1 + 2j]),
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}",
)
def test_arrays_come_back(tmp_path, array):
    back = round_trip({"a": array}, tmp_path)["a"]
    assert isinstance(back, np.ndarray) and back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "lil", "dok", "bsr"])
@pytest.mark.parametrize("build", [sparse.csr_matrix, sparse.csr_array])
def test_sparse_matrices_come_back(tmp_path, form, build):
    dense = np.array([[0, 1.5, 0], [2, 0, 0]], np.float32)
    matrix = build(dense).asformat(form)
    back = round_trip([matrix], tmp_path)[0]
    assert type(back) is type(matrix)
    assert back.dtype == matrix.dtype
    np.testing.assert_array_equal(back.toarray(), dense)


def test_empty_sparse_matrix(tmp_path):
    assert round_trip(sparse.csr_matrix((3, 0)), tmp_path).shape == (3, 0)


def test_random_states_continue_where_they_were(tmp_path):
    generator = np.random.default_rng(3)
    state = {
        "numpy": np.random.get_state(),
        "generator": generator.bit_generator.state,
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
    }
    back = round_trip(state, tmp_path)
    expected = np.random.rand(), generator.random(), random.random(), torch.rand(1)
    np.random.set_state(back["numpy"])
    generator.bit_generator.state = back["generator"]
    random.setstate(back["python"])
    torch.set_rng_state(back["torch"])
    assert expected == (np.random.rand(), generator.random(), random.random(), torch.rand(1))


def test_other_values_come_back(tmp_path):
    state = {
        "none": None,
        "int": 2**100,
        "complex": 1j,
        "tuple": (1, (2.5, "a"), []),
        "set": {1, ("a", 2)},
        "frozenset": frozenset("ab"),
        "bytes": b"\x00\xff",
        "no bytes": b"",
        "device": torch.device("cuda", 1),
        "dtype": torch.float16,
        3: {(1, "key"): True},
        TAG: "my own",
        "nested": {TAG: [{"x": np.int64(3)}]},
    }
    back = round_trip(state, tmp_path)
    assert back == state
    assert type(back["nested"][TAG][0]["x"]) is int


def test_what_comes_back_as_something_simpler(tmp_path):
    state = {
        "scalar": np.float32(0.5),
        "flag": np.bool_(True),
        "text": np.str_("a"),
        "enum": Colour.RED,
        "default": defaultdict(list, a=[1]),
        "size": torch.Size([1, 2]),
        np.int64(4): "key",
    }
    back = round_trip(state, tmp_path)
    assert back == {
        "scalar": 0.5,
        "flag": True,
        "text": "a",
        "enum": "RED",
        "default": {"a": [1]},
        "size": (1, 2),
        4: "key",
    }
    assert [type(back[key]) for key in ("scalar", "flag", "text")] == [float, bool, str]


def test_state_dictionaries_of_torch_keep_order_and_versions(tmp_path):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    back = round_trip({"m": model.state_dict(), "o": optimizer.state_dict()}, tmp_path)
    assert isinstance(back["m"], OrderedDict)
    assert back["m"]._metadata == model.state_dict()._metadata
    optimizer.load_state_dict(back["o"])
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, back["m"][name])


def test_a_config_becomes_its_entries(tmp_path):
    class Config:
        final_config_dict = {
            "model": "BPR",
            "device": torch.device("cpu"),
            "type": Colour.RED,
            "topk": [np.int64(5), (1, 2)],
            "nested": {"a": object},
        }

        def __getattr__(self, name):
            raise AttributeError(name)

    assert round_trip({"config": Config()}, tmp_path)["config"] == {
        "model": "BPR",
        "device": "cpu",
        "type": "RED",
        "topk": [5, (1, 2)],
        "nested": {"a": "<class 'object'>"},
    }


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (object(), "state['a'][0]"),
        (lambda: None, "function"),
        (torch.nn.Linear(1, 1), "Linear"),
        (np.array([object()]), "object"),
        (np.array(["2020-01-01"], "M8[D]"), "datetime64"),
        ({frozenset([1]): 1}, "key"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_written(tmp_path, value, where):
    path = tmp_path / "state.pth"
    with pytest.raises(CheckpointError, match=r"state\['a'\]\[0\]") as error:
        save_plain({"a": [value]}, path)
    assert where in str(error.value)
    assert not path.exists()


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text() | st.just(TAG) | st.integers(), inner)
        ),
        max_leaves=20,
    )
)
def test_any_plain_nesting_is_kept(state):
    assert from_plain(to_plain(state)) == state


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth: there is no such file"):
        load_plain(tmp_path / "none.pth")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file(tmp_path, share):
    path = tmp_path / "state.pth"
    save_plain({"weights": torch.rand(100)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"state.pth: cannot be read .*earlier checkpoint"):
        load_plain(path)


@pytest.mark.parametrize("content", [b"no checkpoint\n" * 9, b"PK\x03\x04" + bytes(99)])
def test_something_else(tmp_path, content):
    path = tmp_path / "state.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.pth: cannot be read"):
        load_plain(path)


def test_unknown_tag(tmp_path):
    torch.save({TAG: "hologram"}, tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match=r"'hologram'.*upgrade"):
        load_plain(tmp_path / "state.pth")


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path, protocol):
    path, trace = tmp_path / "model.pth", tmp_path / "ran"
    code = f"""
import os, pickle, sys, torch
from recbole_mmdiff.storage import CheckpointError, load_plain
class Hostile:
    def __reduce__(self):
        return os.mkdir, ({str(trace)!r},)
path = {str(path)!r}
if {protocol == "torch"}:
    torch.save({{"state_dict": Hostile()}}, path)
else:
    open(path, "wb").write(pickle.dumps(Hostile()))
try:
    load_plain(path)
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "holds pickled Python objects" in done.stdout, done.stderr
    assert not trace.exists()
    with open(path, "rb") as file:
        torch.load(file, weights_only=False) if protocol == "torch" else pickle.load(file)
    assert trace.exists(), "the trap works once it is unpickled"
