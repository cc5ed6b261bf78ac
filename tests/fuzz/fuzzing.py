"""Readers of files against files that are faulty: each takes the file, or refuses it in words.

    python tests/fuzz/fuzzing.py --seconds=600 --seed=1

An input is valid files of which one was changed. A reader may succeed, or raise a ConfigError, a DataError
or a CheckpointError that names the file; anything else is a crash, and so are more seconds or memory than
``SECONDS`` and ``MEMORY``. Input ``number`` of a target is the same on every machine.
"""

import argparse
import faulthandler
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf
from pathlib import Path
from random import Random
from time import perf_counter
from unittest.mock import patch

import yaml
from mutations import mutated

from recbole_mmdiff.errors import CheckpointError, ConfigError, DataError

try:
    import resource
except ImportError:     # Not on Windows, which bounds nothing then.
    resource = None

REFUSALS = (ConfigError, DataError, CheckpointError)
SECONDS = 5.0
BREATH = 16     # inputs
MEMORY = 2 << 30    # beyond what the process has at the start, in bytes


class Hang(BaseException):
    """A reader took too long; no ``except Exception`` takes it for a damaged file."""


@dataclass
class Crash:
    """A kind of crash: what was raised, where, and one input that does it."""

    what: str
    number: int
    file: str
    content: bytes
    trace: str
    count: int = 0


@dataclass
class Outcome:
    """What became of the inputs of a target."""

    inputs: int = 0
    accepted: int = 0
    refused: Counter = field(default_factory=Counter)
    crashes: dict[str, Crash] = field(default_factory=dict)

    def __str__(self) -> str:
        refused = ", ".join(f"{count:,} {name}" for name, count in sorted(self.refused.items()))
        crashed = sum(crash.count for crash in self.crashes.values())
        return (f"{self.inputs:,} inputs, {self.accepted:,} accepted, {self.refused.total():,} refused "
                f"({refused}), {crashed:,} crashes of {len(self.crashes)} kinds")


@contextmanager
def bounded() -> Iterator[None]:
    """No more seconds than ``SECONDS``, no more memory than ``MEMORY``, and nothing on the console."""
    limits = None
    if resource is not None and os.path.exists("/proc/self/statm"):
        limits = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    # Of the processor, so that a busy machine makes no hang.
    before = signal.signal(signal.SIGPROF, _hang) if hasattr(signal, "SIGPROF") else None
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if before is not None:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
            yield
    finally:
        if before is not None:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
        logging.disable(logging.NOTSET)
        if limits is not None:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def _hang(*_):
    raise Hang(f"more than {SECONDS:g} seconds")


def is_named(message: str, target, file: str, original: bytes) -> bool:
    """Whether a message names the file, or what the target has instead, or of a configuration a key."""
    if Path(file).name in message or (target.named and re.search(target.named, message)):
        return True
    keys = re.findall(rb"(?m)^(\w+):", original) if file.endswith(".yaml") else []
    return any(re.search(rf"\b{key.decode()}\b", message) for key in keys)


def try_input(target, number: int, seed: int, folder: Path, outcome: Outcome) -> None:
    """Change a file of the target's, read, note what comes of it, and put the file right again."""
    draw = Random(f"{seed}/{target.name}/{number}")
    file = draw.choice(sorted(target.files))
    original = (folder / file).read_bytes()
    content = mutated(original, target.files[file], draw)
    (folder / file).write_bytes(content)
    outcome.inputs += 1
    crash = trace = None
    try:
        with bounded():
            target.read(folder)
        outcome.accepted += 1
    except REFUSALS as error:
        trace = traceback.format_exc()
        outcome.refused[type(error).__name__] += 1
        if not is_named(str(error), target, file, original):
            crash = f"{type(error).__name__} without a name in {_place(error)}: {str(error)[:100]}"
    except (Exception, Hang) as error:
        trace = traceback.format_exc()
        crash = f"{type(error).__name__} in {_place(error)}: {str(error)[:100]}"
    finally:
        (folder / file).write_bytes(original)
    if crash:
        first = Crash(crash, number, file, content, trace)
        outcome.crashes.setdefault(crash.partition(": ")[0], first).count += 1


def _place(error: BaseException) -> str:
    """The last line of our own code that the error came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if re.search(r"recbole_mmdiff|dataset_prep", frame.filename)
              and "site-packages" not in frame.filename and "tests" not in Path(frame.filename).parts]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "a library"


def fuzz(target, seed: int, folder: Path, inputs: float = inf, seconds: float = inf) -> Outcome:
    """Give a target so many inputs, or as many as the seconds allow."""
    target.make(folder)
    with yaml_once():
        target.read(folder)     # What is not changed must be taken.
        outcome, end = Outcome(), perf_counter() + seconds
        while outcome.inputs < inputs and perf_counter() < end:
            if outcome.inputs % BREATH == 0:
                # Where Python does not come to its signals, one can but end, and leave the input there.
                faulthandler.dump_traceback_later(2 * BREATH * SECONDS, exit=True)
            try_input(target, outcome.inputs, seed, folder, outcome)
    faulthandler.cancel_dump_traceback_later()
    return outcome


@contextmanager
def yaml_once() -> Iterator[None]:
    """The same text of YAML is parsed once: defaults are, at every reading of a configuration."""
    load, kept = yaml.load, lru_cache(64)(yaml.load)
    with patch.object(yaml, "load", lambda text, Loader: deepcopy(kept(text, Loader))
                      if isinstance(text, str) else load(text, Loader)):
        yield


def main() -> int:
    """Fuzz all targets, the same seconds each; 1 if there was a crash."""
    from targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of targets: A,B")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that crash")
    options = parser.parse_args()
    chosen = [target for target in TARGETS if not options.only or target.name in options.only.split(",")]
    crashes = total = 0
    for target in chosen:
        with tempfile.TemporaryDirectory() as folder:
            outcome = fuzz(target, options.seed, Path(folder), seconds=options.seconds / len(chosen))
        total, crashes = total + outcome.inputs, crashes + len(outcome.crashes)
        print(f"{target.name}: {outcome}", flush=True)
        for crash in outcome.crashes.values():
            print(f"  {crash.count} x {crash.what}\n    input {crash.number}, {crash.file}")
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                name = f"{target.name}-{crash.number}-{Path(crash.file).name}"
                (options.keep / name).write_bytes(crash.content)
                (options.keep / f"{name}.txt").write_text(crash.trace, encoding="utf-8", errors="replace")
    print(f"all: {total:,} inputs, {crashes} kinds of crashes")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
