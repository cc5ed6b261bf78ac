"""Starting the processes of one run on this machine, as torchrun would."""

import os
import signal
from collections.abc import Callable

from torch import multiprocessing

from recbole_mmdiff.errors import TOLD, ProcessError


def run_processes(function: Callable, arguments: dict, count: int, environment: dict[str, str],
                  offset: int = 0) -> str | None:
    """Call ``function(**arguments)`` in new processes, and wait until all have ended.

    The first that fails ends the others. A script that calls this does so below
    ``if __name__ == "__main__":``, as with all spawned processes.

    Args:
        function: of a module, so that the processes can import it; returns text, or nothing.
        arguments: plain values.
        count: how many processes.
        environment: what they find each other by, apart from their numbers.
        offset: the number of the first.

    Returns:
        what it returned in the first of them.

    Raises:
        ConfigError, DataError ... (``TOLD``): what one of them was told.
        ProcessError: one ended without a message.
    """
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), **environment}
    said = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        multiprocessing.spawn(_process, (function, arguments, environment, offset, said), count)
    except multiprocessing.ProcessExitedException as error:
        raise _told(said) or ProcessError(_ended(error, offset)) from error
    return said.get()


def _process(number: int, function: Callable, arguments: dict, environment: dict[str, str], offset: int,
             said) -> None:
    os.environ.update(environment, RANK=str(offset + number), LOCAL_RANK=str(number))
    try:
        made = function(**arguments)
        if not number:
            said.put(made)
    except TOLD as error:
        said.put((type(error), str(error)))
        raise SystemExit(2) from error


def _told(said) -> Exception | None:
    """The first message of a process that others did not fail for."""
    told = []
    while not said.empty():
        if isinstance(message := said.get(), tuple):
            told.append(message)
    told.sort(key=lambda message: message[0] is ProcessError)
    return told[0][0](told[0][1]) if told else None


def _ended(error: multiprocessing.ProcessExitedException, offset: int) -> str:
    name = getattr(error, "signal_name", None) or f"exit code {error.exit_code}"
    hint = " (out of memory, perhaps)" if name == signal.SIGKILL.name else ""
    return (f"process {offset + error.error_index} of the run was ended by {name}{hint}, and the others with "
            f"it; --resume=FOLDER goes on from the last checkpoint")
