"""A short fuzzing of every reader, and of the fuzzing itself."""

import time
from random import Random

import pytest
from fuzzing import Hang, fuzz
from mutations import KINDS, mutated
from targets import TARGETS, Target

from recbole_mmdiff.errors import DataError

#: inputs of targets that take longer than others
FEWER = {"runs": 25, "resumed runs": 10, "comparisons": 12, "recipes": 40}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_faulty_files_are_refused_in_words(target, tmp_path):
    outcome = fuzz(target, seed=0, folder=tmp_path, inputs=FEWER.get(target.name, 60))
    assert outcome.refused.total() > outcome.inputs // 4, "the faults must be faults"
    assert outcome.crashes == {}, "".join(crash.trace for crash in outcome.crashes.values())


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_same_for_longer(target, tmp_path):
    outcome = fuzz(target, seed=1, folder=tmp_path, seconds=20)
    assert outcome.crashes == {}, str(outcome)


def crash_of(folder, fault, content=b"x"):
    """The one kind of crash of a reader that does ``fault`` once its file is another one."""
    def read(folder):
        if (folder / "file.txt").read_bytes() != content:
            fault()

    def make(folder):
        (folder / "file.txt").write_bytes(content)

    target = Target("made up", {"file.txt": "binary"}, make, read)
    outcome = fuzz(target, seed=0, folder=folder, inputs=1)
    assert (folder / "file.txt").read_bytes() == content
    return [crash.what for crash in outcome.crashes.values()]


def refuse(message):
    raise DataError(message)


@pytest.mark.parametrize(("fault", "what"), [
    (lambda: {}["key"], "KeyError"), (lambda: refuse("it is broken"), "DataError without a name"),
    (lambda: bytearray(1 << 34), "MemoryError"), (lambda: [][1], "IndexError")])
def test_what_counts_as_a_crash(tmp_path, fault, what):
    (found,) = crash_of(tmp_path, fault)
    assert found.startswith(what)


def test_a_hang_counts_as_a_crash(tmp_path, monkeypatch):
    def forever():
        end = time.monotonic() + 30
        while time.monotonic() < end:
            pass

    monkeypatch.setattr("fuzzing.SECONDS", 0.2)
    (found,) = crash_of(tmp_path, forever)
    assert found.startswith(Hang.__name__)


def test_a_refusal_that_names_the_file_is_none(tmp_path):
    assert crash_of(tmp_path, lambda: refuse("file.txt, line 1: is broken")) == []


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_faults_follow_from_the_seed(kind):
    content = b"user_id:token\titem_id:token\n" + b"a\tb\n" * 20
    first, second, other = ([mutated(content, kind, Random(f"{seed}/{number}")) for number in range(30)]
                            for seed in (1, 1, 2))
    assert first == second != other
    assert len(set(first)) > 15
