"""Batches of like length; work in shards that survives kill -9 and is shared by processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import slow_encoder
from filelock import Timeout
from slow_encoder import SlowEncoder, vector
from tiny_models import SENTENCES, write_items

from dataset_prep.batches import batches, encode_samples
from dataset_prep.cli import main
from dataset_prep.encode import encode
from dataset_prep.encoders import ENCODERS, Sample
from dataset_prep.shards import Work
from recbole_mmdiff.errors import ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[2]
ITEMS, SHARD = 95, 10


@pytest.fixture(autouse=True)
def register():
    with pytest.MonkeyPatch.context() as patch:    # of its own: tests undo theirs midway
        patch.setitem(ENCODERS, "slow", slow_encoder.ENTRY)
        yield


# Batches


@pytest.mark.parametrize("max_rows, max_tokens", [(1, 100), (4, 10**9), (1000, 60), (7, 50), (3, 1)])
def test_batches_hold_every_row_once_and_keep_to_their_limits(max_rows, max_tokens):
    lengths = np.random.default_rng(0).integers(0, 40, size=200).tolist()
    found = list(batches(lengths, max_rows, max_tokens))
    assert sorted(row for batch in found for row in batch) == list(range(200))
    longest = [max(lengths[row] for row in batch) for batch in found]
    assert longest == sorted(longest, reverse=True)
    for batch, width in zip(found, longest, strict=True):
        assert len(batch) <= max_rows
        assert len(batch) * width <= max_tokens or len(batch) == 1
    assert list(batches([], 4, 10)) == []


class Odd(SlowEncoder):
    """Zero for "zero", NaN for "nan"; no tokens in "mute"; reads five tokens."""

    max_length = 5

    def lengths(self, samples):
        return [0 if sample.text == "mute" else len(sample.text) for sample in samples]

    def encode(self, samples):
        values = {"zero": 0.0, "nan": np.nan, "oom": None}
        if any(sample.text == "oom" for sample in samples):
            raise RuntimeError("CUDA out of memory")
        rows = [[values.get(sample.text, len(sample.text)), 0] for sample in samples]
        return np.array(rows, dtype=np.float32)


def test_what_has_no_vector_is_left_out_with_a_reason():
    texts = ["four", "", "zero", "  ", "mute", "longer", "1"]
    done = []
    found = encode_samples(Odd(), [Sample(text, text) for text in texts], batch_size=2, advance=done.append)
    assert found.rows.tolist() == [0, 5, 6] and found.matrix[:, 0].tolist() == [4, 6, 1]
    assert found.left_out == {1: "no text", 2: "its vector is zero", 3: "no text", 4: "no known word"}
    assert found.cut == 1 and sum(done) == len(texts)
    unit = encode_samples(Odd(), [Sample(text, text) for text in texts], normalize=True)
    assert unit.matrix[:, 0].tolist() == [1, 1, 1]
    nothing = encode_samples(Odd(), [Sample("a", "")])
    assert nothing.matrix.shape == (0, 0) and nothing.left_out == {0: "no text"}


def test_vectors_that_are_no_numbers_and_batches_that_are_too_large():
    with pytest.raises(DataError, match="the vector of 'b' holds NaN or Inf"):
        encode_samples(Odd(), [Sample("a", "x"), Sample("b", "nan")])
    with pytest.raises(DataError, match="a batch of 2 does not fit into memory; lower --batch-tokens"):
        encode_samples(Odd(), [Sample("a", "x"), Sample("b", "oom")])


# Shards


@pytest.fixture
def folder(tmp_path):
    rows = [(f"i{n}", "" if n % 17 == 3 else f"{SENTENCES[n % 12]} {n}", "") for n in range(ITEMS)]
    return write_items(tmp_path / "toy", rows)


def expected(folder):
    texts = {line.split("\t")[0]: line.split("\t")[1]
             for line in (folder / "toy.item").read_text().splitlines()[1:]}
    return {token: vector(text) for token, text in texts.items() if text}


def check(feature, folder):
    wanted = expected(folder)
    assert feature.tokens == tuple(wanted)
    np.testing.assert_array_equal(feature.matrix, np.stack(list(wanted.values())))
    feature.verify()
    empty = [f"i{n}" for n in range(3, ITEMS, 17)]
    assert feature.manifest["left_out"] == {"no text": {"count": len(empty), "first": empty[:5]}}
    assert feature.manifest["inputs"] == ITEMS
    assert not list(feature.folder.glob(".toy.*"))


@pytest.mark.parametrize("shard_size", [1, SHARD, ITEMS, 1000])
def test_shards_add_up_to_the_feature(folder, shard_size):
    outcome = encode(folder, "slow", shard_size=shard_size, batch_size=3)
    check(outcome.feature, folder)
    assert outcome.inputs == ITEMS


def test_a_finished_feature_is_not_made_again(folder, monkeypatch):
    before = encode(folder, "slow").feature.path.stat()
    monkeypatch.setattr(SlowEncoder, "encode", None)
    again = encode(folder, "slow", shard_size=7)    # another way to the same feature
    assert again.inputs == 0
    assert again.feature.path.stat().st_mtime_ns == before.st_mtime_ns
    assert not again.made
    for change, told in (({"dim": 5}, "components was 4 and is 5"), ({"normalize": True}, "normalize was"),
                         ({"store": "float16"}, "store was 'float32' and is 'float16'"),
                         ({"separator": "-"}, "separator was '. ' and is '-'")):
        with pytest.raises(DataError, match=f"exists, made of .* settings: {told}.*; --restart"):
            encode(folder, "slow", **change)
    monkeypatch.undo()
    assert encode(folder, "slow", dim=5, restart=True).feature.matrix.shape[1] == 5


def test_what_was_asked_is_compared_and_what_came_of_it_is_recorded(folder, monkeypatch):
    """Newer libraries do not make a feature stale; what the model settles is not a change."""
    monkeypatch.setattr(SlowEncoder, "versions", lambda self: {"numpy": "0.1"})
    monkeypatch.setattr(SlowEncoder, "resolved", lambda self: {"scale": "as it was", "kernel": "fast"})
    manifest = encode(folder, "slow").feature.manifest
    assert (manifest["numpy"], manifest["scale"], manifest["kernel"]) == ("0.1", "as it was", "fast")
    monkeypatch.undo()
    assert not encode(folder, "slow").made
    with pytest.raises(DataError, match="settings: components was 4 and is 5; --restart"):
        encode(folder, "slow", dim=5)
    with pytest.raises(DataError, match="settings: encoder was 'slow' and is 'lsa'; --restart"):
        encode(folder, "lsa", dim=2, separator="-", modality="slow")


class Interrupted(KeyboardInterrupt):
    pass


def interrupted(monkeypatch, after):
    """Make the encoder fail at its ``after``-th batch."""
    calls, encode_batch = [], SlowEncoder.encode

    def encode(self, samples):
        calls.append(len(samples))
        if len(calls) > after:
            raise Interrupted
        return encode_batch(self, samples)

    monkeypatch.setattr(SlowEncoder, "encode", encode)


def test_unfinished_work_goes_on_and_refuses_other_settings(folder, monkeypatch):
    interrupted(monkeypatch, after=4)
    with pytest.raises(Interrupted):
        encode(folder, "slow", shard_size=SHARD)
    monkeypatch.undo()
    work = folder / ".toy.slow.shards"
    assert sorted(path.name for path in work.glob("*.npz")) == [f"{n:05d}.npz" for n in range(4)]
    assert not (folder / "toy.slow.json").exists()
    with pytest.raises(DataError, match="components was 4 and is 5; --restart throws the 4 finished shards"):
        encode(folder, "slow", shard_size=SHARD, dim=5)
    with pytest.raises(DataError, match="shard_size was 10 and is 20"):
        encode(folder, "slow", shard_size=20)
    outcome = encode(folder, "slow", shard_size=SHARD)
    assert outcome.inputs == ITEMS - 4 * SHARD
    check(outcome.feature, folder)


def test_changed_inputs_and_a_restart(folder, monkeypatch):
    interrupted(monkeypatch, after=2)
    with pytest.raises(Interrupted):
        encode(folder, "slow", shard_size=SHARD)
    monkeypatch.undo()
    item = folder / "toy.item"
    item.write_text(item.read_text().replace(SENTENCES[0], "another text"))
    with pytest.raises(DataError, match="begun otherwise: inputs_sha256 was"):
        encode(folder, "slow", shard_size=SHARD)
    outcome = encode(folder, "slow", shard_size=SHARD, restart=True)
    assert outcome.inputs == ITEMS
    check(outcome.feature, folder)


def test_a_restart_begins_anew_and_can_be_continued(folder, monkeypatch):
    for command in ({"restart": True}, {}):
        with monkeypatch.context() as patch:    # unfinished, with the same settings
            interrupted(patch, after=3)
            with pytest.raises(Interrupted):
                encode(folder, "slow", shard_size=SHARD, modality="other")
        with monkeypatch.context() as patch:
            interrupted(patch, after=4)
            with pytest.raises(Interrupted):
                encode(folder, "slow", shard_size=SHARD, modality="other", restart=True)
        again = encode(folder, "slow", shard_size=SHARD, modality="other", **command)
        assert again.made and again.inputs == ITEMS - 4 * SHARD
        check(again.feature, folder)
        (folder / "toy.other.json").unlink()


@pytest.mark.parametrize("command", [{"restart": True}, {}])
def test_a_finished_feature_whose_restart_was_cut_short(folder, monkeypatch, command):
    encode(folder, "slow", dim=3, shard_size=SHARD)
    for scale in (1.0, 2.0):
        with monkeypatch.context() as patch:
            interrupted(patch, after=4)
            with pytest.raises(Interrupted):
                encode(folder, "slow", shard_size=SHARD, scale=scale, restart=True)
    with pytest.raises(DataError, match="components was 3 and is 4"):    # The restart was another.
        encode(folder, "slow", shard_size=SHARD)
    again = encode(folder, "slow", shard_size=SHARD, scale=2.0, **command)
    assert again.made and again.inputs == ITEMS - 4 * SHARD and again.feature.manifest["scale"] == 2.0
    assert not encode(folder, "slow", shard_size=SHARD, scale=2.0).made
    assert encode(folder, "slow", shard_size=SHARD, scale=2.0, restart=True).inputs == ITEMS


def test_a_failed_start_leaves_nothing(folder, monkeypatch):
    interrupted(monkeypatch, after=0)
    with pytest.raises(Interrupted):
        encode(folder, "slow", shard_size=SHARD)
    assert not list(folder.glob(".toy.*"))


def test_a_start_killed_before_its_first_shard_is_in_nobodys_way(folder):
    work = folder / ".toy.slow.shards"
    process = start(folder, seconds=60)
    deadline = time.monotonic() + 60
    while not (work / "plan.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert (work / "plan.json").is_file() and not list(work.glob("*.npz"))
    assert encode(folder, "slow", dim=5).feature.matrix.shape[1] == 5


def test_a_run_that_only_puts_together_says_so(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("dataset_prep.shards.write_features", None)
        with pytest.raises(TypeError):
            encode(folder, "slow")
    main(["encode", "--data", str(folder), "--encoder", "slow"])
    told = capsys.readouterr().out
    assert "put together" in told and "finished already" not in told
    check(encode(folder, "slow").feature, folder)


def test_faults_within_are_not_taken_for_another_run(folder, monkeypatch):
    def save(self, shard, encoded):
        raise Timeout("another lock")

    monkeypatch.setattr(Work, "save", save)
    with pytest.raises(Timeout):
        encode(folder, "slow")


def test_the_folder_is_not_searched_after_every_shard(folder, monkeypatch):
    looks, finished = [], Work.finished
    monkeypatch.setattr(Work, "finished", lambda self: looks.append(self) or finished(self))
    encode(folder, "slow", shard_size=1)
    assert 0 < len(looks) < 5


def test_a_damaged_shard_is_named(folder, monkeypatch):
    interrupted(monkeypatch, after=4)
    with pytest.raises(Interrupted):
        encode(folder, "slow", shard_size=SHARD)
    monkeypatch.undo()
    shard = folder / ".toy.slow.shards" / "00002.npz"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match=r"00002.npz: is damaged .*; delete it"):
        encode(folder, "slow", shard_size=SHARD)
    shard.unlink()
    check(encode(folder, "slow", shard_size=SHARD).feature, folder)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"null", b"[" * 100_000])
def test_a_damaged_plan_is_named(folder, monkeypatch, content):
    interrupted(monkeypatch, after=4)
    with pytest.raises(Interrupted):
        encode(folder, "slow", shard_size=SHARD)
    monkeypatch.undo()
    (folder / ".toy.slow.shards" / "plan.json").write_bytes(content)
    with pytest.raises(DataError, match=r"plan\.json: is damaged .*; delete the folder"):
        encode(folder, "slow", shard_size=SHARD)


@pytest.mark.parametrize("changes", [
    {"rows": np.array([0, 1])}, {"rows": np.array(3)}, {"matrix": np.zeros(3)}, {"cut": np.array([1, 2])},
    {"left_out": np.array([99_999])}, {"reasons": np.array(["a", "b"])}, {"matrix": np.zeros((10, 7))}])
def test_a_shard_whose_arrays_do_not_belong_together(folder, monkeypatch, changes):
    interrupted(monkeypatch, after=4)
    with pytest.raises(Interrupted):
        encode(folder, "slow", shard_size=SHARD)
    monkeypatch.undo()
    shard = folder / ".toy.slow.shards" / "00001.npz"
    with np.load(shard) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(shard, **{**arrays, **changes})
    with pytest.raises(DataError, match=r"00001\.npz: .*delete it"):
        encode(folder, "slow", shard_size=SHARD)


def test_numbers_that_float16_cannot_hold(folder):
    feature = encode(folder, "slow", store="float16", modality="half").feature
    assert feature.matrix.dtype == np.float16
    np.testing.assert_allclose(feature.matrix, np.stack(list(expected(folder).values())), atol=2e-3)
    with pytest.raises(DataError, match="'i0' holds a number that float16 cannot; --store float32"):
        encode(folder, "slow", store="float16", scale=1e6)
    with pytest.raises(ConfigError, match="--store: 'int8' is not known"):
        encode(folder, "slow", store="int8")


def test_nothing_to_encode(tmp_path):
    with pytest.raises(DataError, match="none of the 2 inputs has a vector: 2 no text"):
        encode(write_items(tmp_path / "toy", [("a", "", ""), ("b", "", "")]), "slow")
    assert not list((tmp_path / "toy").glob(".toy.*"))    # nothing to be kept


# Processes


def start(folder, *options, seconds=0.0, rank=None, size=None, port=None):
    environment = {**os.environ, "SLOW_SECONDS": str(seconds), "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(REPOSITORY)}
    if rank is not None:
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, slow_encoder.__file__, "--data", str(folder), "--encoder", "slow",
               "--shard-size", str(SHARD), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_shards(work, count, process):
    deadline = time.monotonic() + 60
    while len(list(work.glob("[0-9]*.npz"))) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def kill_after(work, count, process):
    """Kill a process once so many shards are there; how many are in the end."""
    wait_for_shards(work, count, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return len(list(work.glob("[0-9]*.npz")))


def test_killed_and_started_again(folder):
    """What kill -9 leaves is whole shards; they are kept, and nothing but the rest is encoded."""
    work = folder / ".toy.slow.shards"
    kill_after(work, 2, start(folder, seconds=0.3))
    kept = {path.name: path.stat().st_mtime_ns for path in work.glob("[0-9]*.npz")}
    assert 2 <= len(kept) < ITEMS // SHARD
    assert not (folder / "toy.slow.json").exists()
    done = kill_after(work, len(kept) + 1, start(folder, seconds=0.3))
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in work.glob("[0-9]*.npz")}.items()
    outcome = encode(folder, "slow", shard_size=SHARD)
    assert outcome.inputs == ITEMS - done * SHARD
    check(outcome.feature, folder)


def test_another_run_at_the_same_time_is_refused(folder):
    process = start(folder, seconds=0.3)
    wait_for_shards(folder / ".toy.slow.shards", 1, process)
    with pytest.raises(DataError, match="another run encodes this feature now"):
        encode(folder, "slow", shard_size=SHARD)
    assert process.wait() == 0
    process.communicate()
    check(encode(folder, "slow", shard_size=SHARD).feature, folder)


def test_two_processes_share_the_work(folder):
    """Continuing what one process began, too."""
    work = folder / ".toy.slow.shards"
    done = kill_after(work, 2, start(folder, seconds=0.3))
    port = free_port()
    pair = [start(folder, rank=rank, size=2, port=port, seconds=0.05) for rank in (0, 1)]
    told = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    assert f"encoded {ITEMS - done * SHARD:,} in" in told[0][0] and not told[1][0]
    check(encode(folder, "slow", shard_size=SHARD).feature, folder)


def test_only_the_first_process_tells_of_a_finished_feature(folder, monkeypatch):
    encode(folder, "slow")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        outcome = encode(folder, "slow")
        assert outcome is None if rank else not outcome.made


@pytest.mark.parametrize("size", [None, "1"])
def test_a_rank_among_no_others(folder, monkeypatch, size):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    check(encode(folder, "slow").feature, folder)


def test_the_death_of_a_process_is_told(folder):
    work, port = folder / ".toy.slow.shards", free_port()
    pair = [start(folder, rank=rank, size=2, port=port, seconds=0.2) for rank in (0, 1)]
    wait_for_shards(work, 3, pair[0])
    pair[1].send_signal(signal.SIGKILL)
    out, error = pair[0].communicate(timeout=120)
    pair[1].communicate()
    assert pair[0].returncode == 1 and not out
    assert "refused: another of the 2 processes ended early" in error
    check(encode(folder, "slow", shard_size=SHARD).feature, folder)


def test_processes_that_torchrun_did_not_start(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match=r"the other processes cannot be found .*; start them with torchrun"):
        encode(folder, "slow")


def test_the_plan_is_plain_json(folder, monkeypatch):
    interrupted(monkeypatch, after=1)
    with pytest.raises(Interrupted):
        encode(folder, "slow", shard_size=SHARD)
    plan = json.loads((folder / ".toy.slow.shards" / "plan.json").read_text())
    assert plan["encoder"] == "slow" and plan["inputs"] == ITEMS and plan["store"] == "float32"
