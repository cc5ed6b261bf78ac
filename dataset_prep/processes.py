"""The processes that torchrun starts for one piece of work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from recbole_mmdiff.errors import DataError

_JOINING = timedelta(minutes=10)
_WORKING = timedelta(days=7)    # others may have the longer texts
_LOOK = 0.2    # seconds between looks while waiting


class Processes:
    """This process among its fellows: ``rank`` of ``size``. One alone needs no torchrun."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        # Clusters set RANK for purposes of their own, too.
        self.rank = int(os.environ.get("RANK", 0)) if self.size > 1 else 0
        self._group = None

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Join the others, who can then be waited for; nothing happens where they are joined already.

        Raises:
            DataError: they cannot be found.
        """
        if self.size == 1 or self._group is not None:
            yield
            return
        import torch.distributed as dist

        try:
            dist.init_process_group("gloo", timeout=_JOINING)
            self._group = dist.new_group(timeout=_WORKING)
        except (ValueError, RuntimeError) as error:
            raise DataError(f"WORLD_SIZE is {self.size}, but the other processes cannot be found "
                            f"({error}); start them with torchrun") from error
        try:
            yield
        finally:
            self._group = None
            dist.destroy_process_group()

    def wait(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Wait until all are here; ``meanwhile`` is called now and then.

        Raises:
            DataError: another process ended before.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        try:
            work = dist.barrier(self._group, async_op=True)
            while not work.is_completed():
                meanwhile()
                time.sleep(_LOOK)
            work.wait()
        except RuntimeError as error:
            raise DataError(f"another of the {self.size} processes ended early; its own message says "
                            f"why. Start again: what is done is kept ({error})") from error
