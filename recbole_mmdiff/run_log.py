"""The log of a run: its file, the console, and what is logged before there is a folder."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

from recbole_mmdiff import distributed
from recbole_mmdiff.files import telling_of_disk
from recbole_mmdiff.run_folder import LOG


class RunLog(logging.FileHandler):
    """``train.log`` of a run folder. A full disk ends the log, which is told once, and not the run.

    Args:
        folder: of the run, where RecBole writes, too.
        tensorboard: whether RecBole writes TensorBoard files there.
    """

    def __init__(self, folder: Path, tensorboard: bool):
        super().__init__(folder / LOG, encoding="utf-8")
        self.run_folder, self.tensorboard, self.told = str(folder), tensorboard, False
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Called in place of a traceback for each message."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            with suppress(OSError):     # It may lead to a file on the same disk.
                print(f"{self.baseFilename}: the log cannot be written ({error.strerror}); the run goes on "
                      f"without it", file=sys.stderr)

    def close(self) -> None:
        """What could not be written is let go."""
        with suppress(OSError):
            super().close()


class NoLog(logging.StreamHandler):
    """Of a process that is not the first: on the console, what holds for it alone (``distributed.EACH``); no
    TensorBoard files.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        super().__init__(sys.stderr)
        self.run_folder, self.tensorboard = str(folder), False
        self.addFilter(lambda record: getattr(record, "each", False))
        self.setFormatter(logging.Formatter(f"process {distributed.rank()}: %(message)s"))


def log_to(folder: Path, config, console: bool) -> list[logging.Handler]:
    """Log to ``train.log`` and to the console, and have RecBole write into the run folder too; of several
    processes the first alone."""
    config["checkpoint_dir"] = str(folder)
    if distributed.is_first():
        with telling_of_disk(folder):
            handlers = [RunLog(folder, config["log_tensorboard"])]
    else:
        config["log_wandb"] = False
        handlers = [NoLog(folder)]
    if console and distributed.is_first():
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[-1].setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    for handler in handlers:
        root.addHandler(handler)
    return handlers


@contextmanager
def kept_messages(config) -> Iterator[list[logging.LogRecord]]:
    """What is logged meanwhile, for a log that is not there yet; on an error, warnings are shown."""
    keeper = MemoryHandler(sys.maxsize, flushLevel=sys.maxsize)
    root = logging.getLogger()
    root.setLevel(str(config["state"] or "INFO").upper())
    root.addHandler(keeper)
    try:
        yield keeper.buffer
    except Exception:
        for message in keeper.buffer:
            if message.levelno >= logging.WARNING and distributed.is_first():
                logging.lastResort.handle(message)
        raise
    finally:
        root.removeHandler(keeper)
