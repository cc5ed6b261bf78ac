"""A process that has imported everything, and forks an attempt at each command, so that an attempt costs no
more than its work. Attempts die by SIGKILL: at a moment, from outside, or right before a change of a file.

Each line of the input is a JSON object, answered by one line:

- ``words``: of the command line; ``log``: file for what is printed; ``root``: folder whose changes count.
- ``after``: seconds until the kill; null: so many that something must hang. ``at``: number of the change
  that it dies before, or null; ``half``: cut the file in two that this change would rename, as if it
  had come while that was written.
- the answer: ``code`` (0: done, -9: killed), ``seconds``, and, unless it was killed, its ``changes``.
"""

import contextlib
import json
import os
import pkgutil
import signal
import sys
import time
import traceback
from pathlib import Path

_CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
_HANGS = 300.0
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Changes:
    """An audit hook that writes down what is about to change below a folder, and may kill the process.

    Opening a folder counts, too: it is flushed between a renaming and what follows.
    """

    def __init__(self, root: str, at: int | None, half: bool):
        self.root, self.at, self.half, self.seen = root, at, half, []

    def __call__(self, event, arguments):
        if event not in _CHANGES or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if event == "open":
            if not (arguments[2] & _WRITING or (arguments[1] is None and os.path.isdir(path))):
                return
        elif isinstance(arguments[-1], int) and arguments[-1] >= 0 and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), path)    # shutil.rmtree's
        if not path.startswith(self.root):
            return
        if len(self.seen) == self.at:
            if self.half and event == "os.rename" and os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append(f"{event} {path.removeprefix(self.root)}")


def import_everything() -> None:
    import torch

    import dataset_prep
    from dataset_prep.encoders import ENCODERS
    from recbole_mmdiff import cli, compare, quick_start, report, trainer  # noqa: F401
    from recbole_mmdiff.compare import runner
    from recbole_mmdiff.model.registry import MODELS, get_model

    torch.set_num_threads(1)
    for module in pkgutil.iter_modules(dataset_prep.__path__, "dataset_prep."):
        __import__(module.name)
    for model in [*MODELS, "BPR"]:
        get_model(model)
    ENCODERS["slow"] = ("slow_encoder:SlowEncoder", "for tests")
    # Cells in the process that is killed: spawned ones would import everything anew.
    runner.in_processes = lambda function, jobs, *rest: ((job, function(job)) for job in jobs)


def attempt(job: dict) -> None:
    """The life of a fork; it does not return."""
    from recbole_mmdiff.cli import main

    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    changes = Changes(job["root"], job["at"], job["half"])
    sys.addaudithook(changes)
    code = 1
    try:
        code = main(job["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        Path(job["log"]).with_suffix(".changes").write_text(json.dumps(changes.seen))
        os._exit(code)


def follow(pid: int, after: float) -> int:
    """Wait for a fork, and kill it ``after`` seconds; its exit status as ``Popen.returncode`` has it."""
    deadline = time.monotonic() + after
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def serve() -> None:
    """Answer on the standard output, which nothing else may write to."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import_everything()
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        job, started = json.loads(line), time.monotonic()
        pid = os.fork()
        if pid == 0:
            attempt(job)
        answer = {"code": follow(pid, _HANGS if job["after"] is None else job["after"]),
                  "seconds": time.monotonic() - started}
        if answer["code"] >= 0:
            answer["changes"] = json.loads(Path(job["log"]).with_suffix(".changes").read_text())
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    serve()
