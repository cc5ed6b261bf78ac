"""Commands that are killed and given again, and what became of them beside ones that were never killed."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
KILLED = -9
#: what a clock wrote, at any depth
_TIMES = ("seconds", "throughput")


class Server:
    """The forking process; ``attempt`` is one command in it."""

    def __init__(self, logs: Path):
        self._logs, self._count = logs, 0
        paths = [str(HERE.parent.parent), str(HERE.parent / "prep"), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "kill_server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)})
        assert json.loads(self._process.stdout.readline()) == "ready"

    def attempt(self, words: list[str], root: Path, after: float | None = None, at: int | None = None,
                half: bool = False) -> dict:
        """The answer of the server, and the ``log`` of what was printed; see `kill_server`."""
        self._count += 1
        log = self._logs / f"{self._count:04}.log"
        job = {"words": words, "root": f"{root}/", "log": str(log), "after": after, "at": at, "half": half}
        self._process.stdin.write(json.dumps(job) + "\n")
        return {**json.loads(self._process.stdout.readline()), "log": log}

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@dataclass(frozen=True)
class Kind:
    """A kind of work.

    Attributes:
        command: folder -> the words of the command that does the work in it.
        trains: whether that is a run, in ``run`` of the folder, which ``--resume`` goes on with; else the
            same command goes on.
    """

    name: str
    command: Callable[[Path], list[str]]
    trains: bool = False

    def left(self, root: Path) -> str:
        """What a kill left: ``nothing``, ``part``, or for runs that it came after the end, ``all``."""
        if not self.trains:
            return "part" if any(path.is_file() for path in root.rglob("*")) else "nothing"
        if (root / "run" / "metrics.json").is_file():
            return "all"
        return "part" if (root / "run" / "config.yaml").is_file() else "nothing"

    def next_words(self, root: Path) -> list[str]:
        """What a user would type now."""
        return ["--resume", str(root / "run")] if self.trains and self.left(root) == "part" \
            else self.command(root)


@dataclass
class Whole:
    """A run that was never killed: its files, seconds and changes."""

    files: dict[str, str]
    seconds: float
    changes: list[str]

    def places(self) -> dict[str, list[int]]:
        """The changes by what they change, whatever its number: the places to be killed at."""
        found, renamed = {}, ""
        for number, change in enumerate(self.changes):
            label = re.sub(r"\d+", "0", re.sub(r"[.-][0-9a-f]{8,}(?=[./])", "", change))
            if label.startswith("os.rename"):
                renamed = label
            elif label.startswith("open") and ".tmp." not in label:
                label += f" after {renamed}"    # A folder is flushed after many a file.
            found.setdefault(label, []).append(number)
        return found


@dataclass
class Tally:
    """What became of the kills of a kind."""

    kind: str
    left: Counter = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(self.left.values())

    def told(self) -> str:
        """What is wrong, a line for each."""
        return "\n".join([*self.lost, *self.differing])

    HEADER = f"{'kind':<16}{'kills':>6}{'resumed':>9}{'anew':>6}{'finished':>10}{'lost':>6}{'differing':>11}"

    def __str__(self) -> str:
        return (f"{self.kind:<16}{self.kills:>6}{self.left['part']:>9}{self.left['nothing']:>6}"
                f"{self.left['all']:>10}{len(self.lost):>6}{len(self.differing):>11}")


def whole_run(server: Server, kind: Kind, root: Path) -> Whole:
    """Do the work without a kill; fails where that does."""
    root.mkdir()
    answer = server.attempt(kind.command(root), root)
    assert answer["code"] == 0, answer["log"].read_text()
    return Whole(contents(root), answer["seconds"], answer["changes"])


def outlive(server: Server, kind: Kind, whole: Whole, root: Path, deaths: list[dict], tally: Tally) -> None:
    """Do the work, killed by each of ``deaths`` (``after`` or ``at`` and ``half``) as far as it gets to it,
    and then to its end; count what became of it."""
    root.mkdir()
    killed = []
    for death in [*deaths, {}]:
        if kind.left(root) == "all":
            break
        answer = server.attempt(kind.next_words(root), root, **death)
        if answer["code"] == KILLED:
            tally.left[kind.left(root)] += 1
            killed.append(death)
        elif answer["code"] == 0:
            break
        else:
            tally.lost.append(f"{kind.name} in {root} after {killed}: {answer['log'].read_text()[-2000:]}")
            return
    if changed := differences(whole.files, contents(root)):
        tally.differing.append(f"{kind.name} in {root} after {killed}: {changed}")


def random_deaths(whole: Whole, draw: random.Random, place: str | None) -> list[dict]:
    """One to three kills: the first at a place, or like the others at any moment of the whole run."""
    count = draw.choices((1, 2, 3), (6, 3, 1))[0]
    deaths = [{"after": draw.uniform(0, whole.seconds)} for _ in range(count)]
    if place is not None:
        deaths[0] = {"at": draw.choice(whole.places()[place]), "half": draw.random() < 0.5}
    return deaths


def contents(root: Path) -> dict[str, str]:
    """Path below ``root`` of every file and empty folder -> checksum: without times, the lines of the log,
    and how ``root`` is called. Without the lock of a run, removed last, when nothing is left to resume."""
    return {path.relative_to(root).as_posix(): _checksum(path, str(root))
            for path in sorted(root.rglob("*"))
            if path.name != ".lock" and not (path.is_dir() and any(path.iterdir()))}


def differences(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """What is wrong with ``second``."""
    return [f"{path} is missing" for path in first.keys() - second.keys()] \
        + [f"{path} should not be there" for path in second.keys() - first.keys()] \
        + [f"{path} differs" for path in first.keys() & second.keys() if first[path] != second[path]]


def _checksum(path: Path, root: str) -> str:
    if path.name == "train.log" or path.is_dir():
        return ""
    if path.suffix == ".pth":
        text = _as_text(torch.load(path, weights_only=True))
    elif path.name == "metrics.json" or re.fullmatch(r"trial-\d+\.json", path.name):
        text = _as_text(json.loads(path.read_text()))
    else:
        return hashlib.sha256(path.read_bytes().replace(root.encode(), b"ROOT")).hexdigest()
    return hashlib.sha256(text.replace(root, "ROOT").encode()).hexdigest()


def _as_text(value) -> str:
    """Nested values, tensors by their bytes, without times."""
    if isinstance(value, dict):
        # In order: a run that is resumed reads its configuration from a sorted file.
        return str({key: _as_text(value[key]) for key in sorted(value, key=str) if key not in _TIMES})
    if isinstance(value, (list, tuple)):
        return str([_as_text(entry) for entry in value])
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(value.numpy().tobytes()).hexdigest()}"
    return repr(value)
