"""Jobs on several processes of this machine, or on Ray; a job that dies takes no other with it.

A job is a mapping of plain values, a function takes one and returns a mapping of plain values.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from recbole_mmdiff.errors import ConfigError

EXECUTORS = ("processes", "ray")
DIED = "the process ended without an answer (killed, or out of memory?)"


def in_processes(function: Callable[[dict], dict], jobs: list[dict], workers: int,
                 gpus: int = 0) -> Iterator[tuple[dict, dict]]:
    """(job, answer) of every job, as they finish, ``workers`` at once.

    A process serves many jobs, since starting one takes seconds. With ``gpus`` the job gets a key
    ``gpu_id``, process after process in turn. A process that dies answers ``{"error": ...}``. As
    with all spawned processes, a script calls this below ``if __name__ == "__main__":``.
    """
    waiting, busy = deque(jobs), {}
    slots = [_Slot(number % gpus if gpus else None) for number in range(min(workers, len(jobs)))]
    try:
        while waiting or busy:
            for slot in slots:
                if waiting and slot not in busy.values():
                    job = waiting.popleft()
                    busy[slot.send(function, job)] = slot
                    slot.job = job
            for connection in wait(list(busy)):
                slot = busy.pop(connection)
                yield slot.job, slot.receive()
    finally:
        for slot in slots:
            slot.stop(patience=0.0 if slot in busy.values() else 10.0)


class _Slot:
    """A place for one process, started when it is needed and again when it died."""

    def __init__(self, gpu: int | None):
        self.gpu, self.job, self.process, self.connection = gpu, None, None, None

    def send(self, function, job: dict) -> Connection:
        if self.process is None:
            # Spawned, not forked: a forked CUDA or OpenMP does not work.
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs, os.getpid()))
            self.process.start()
            theirs.close()
        extra = {} if self.gpu is None else {"gpu_id": str(self.gpu)}
        with suppress(OSError):     # It died at once, which the answer will tell.
            self.connection.send((function, {**job, **extra}))
        return self.connection

    def receive(self) -> dict:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.stop()
            return {"error": DIED}

    def stop(self, patience: float = 0.0) -> None:
        """End the process: an idle one by itself within ``patience`` seconds, or at once."""
        if self.process is not None:
            self.connection.close()
            self.process.join(patience)
            self.process.terminate()
            self.process.join()
            self.process = None


def _serve(connection: Connection, parent: int) -> None:
    """The life of a process: jobs until the parent closes the connection, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # The parent decides what Ctrl-C ends.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        try:
            function, job = connection.recv()
        except EOFError:
            return
        connection.send(function(job))


def _end_with(parent: int) -> None:
    """A parent that was killed cannot stop its processes: they must see it themselves."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def on_ray(function: Callable[[dict], dict], jobs: list[dict], threads: int,
           gpus_per_job: float = 0.0) -> Iterator[tuple[dict, dict]]:
    """(job, answer) of every job, as they finish, on the Ray cluster of ``RAY_ADDRESS``, or on one
    of this machine. All machines see the same files.

    Raises:
        ConfigError: Ray cannot be imported.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--executor: ray cannot be imported ({error}); 'pip install -U ray' or, "
                          f"for the Ray of RecBole, 'pip install \"setuptools<81\"'; or use "
                          f"--executor=processes") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    remote = ray.remote(num_cpus=threads, num_gpus=gpus_per_job, max_retries=0)(_on_its_gpu)
    pending = {remote.remote(function, job): job for job in jobs}
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        job = pending.pop(done)
        try:
            yield job, ray.get(done)
        except ray.exceptions.RayError as error:
            yield job, {"error": f"{DIED} {type(error).__name__}"}


def _on_its_gpu(function: Callable[[dict], dict], job: dict) -> dict:
    """Ray chooses the GPU, and RecBole would choose another one."""
    import ray

    gpus = ray.get_gpu_ids()
    return function({**job, "gpu_id": str(gpus[0])} if gpus else job)
