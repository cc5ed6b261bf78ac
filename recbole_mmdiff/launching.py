"""Starting the processes of one run on this machine, as torchrun would."""

import os
import signal
import traceback
from collections.abc import Callable, Sequence

from torch import multiprocessing

from recbole_mmdiff.errors import TOLD, ProcessError

#: seconds in which the others tell, and put their folder in order, before they are ended
GRACE = 5
_TOLD_CODE = 2
_LONGEST = 20_000   # characters of a traceback: what a pipe holds that nobody reads yet


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
        RuntimeError: the traceback of one that failed otherwise.
        ProcessError: one ended without a message.
    """
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), **environment}
    said = multiprocessing.get_context("spawn").SimpleQueue()
    started = multiprocessing.spawn(_process, (function, arguments, environment, offset, said), count,
                                    join=False)
    try:
        while not started.join(grace_period=GRACE):
            pass
    except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException) as error:
        raise _cause(said, [process.exitcode for process in started.processes], offset) from error
    if said.empty():    # Interrupted, say.
        raise ProcessError("the processes of the run ended without a result; --resume=FOLDER goes on from "
                           "the last checkpoint")
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
        raise SystemExit(_TOLD_CODE) from error
    except Exception:
        said.put((RuntimeError, f"in process {offset + number}:\n{traceback.format_exc()[-_LONGEST:]}"))
        raise


def _cause(said, codes: Sequence[int], offset: int) -> Exception:
    """Why processes that ended with ``codes`` failed: a mistake, else a traceback, else a signal; what those
    say who lost another comes last."""
    told = []
    while not said.empty():
        if isinstance(message := said.get(), tuple):
            told.append(message)
    for kind, text in sorted(told, key=lambda message: message[0] is RuntimeError):
        if kind is not ProcessError:
            return kind(text)
    ours = (0, _TOLD_CODE, -signal.SIGTERM)     # The last is how the others are ended here.
    for number, code in enumerate(codes):
        if code not in ours:
            return ProcessError(_ended(code, offset + number))
    if told:
        return ProcessError(told[0][1])
    number, code = next((number, code) for number, code in enumerate(codes) if code)
    return ProcessError(_ended(code, offset + number))


def _ended(code: int, number: int) -> str:
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
    hint = " (out of memory, perhaps)" if name == "SIGKILL" else ""
    return (f"process {number} of the run was ended by {name}{hint}, and the others with it; --resume=FOLDER "
            f"goes on from the last checkpoint")
