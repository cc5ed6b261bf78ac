"""Work in chunks that fit into the memory of a GPU."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from recbole_mmdiff.distributed import EACH
from recbole_mmdiff.errors import ConfigError

Done = TypeVar("Done")


def in_chunks(numbers: Tensor, size: int, work: Callable[[Tensor], Done],
              what: str) -> Iterator[tuple[Tensor, Done]]:
    """Parts of ``numbers`` (n,) and what ``work`` makes of each, ``size`` at a time.

    Where the GPU has not enough memory the part is halved, tried again, and kept so small from then on;
    ``work`` must be able to begin a part anew. Of no numbers there is one part, as of ``torch.split``.

    Raises:
        torch.OutOfMemoryError: a part of one does not fit.
    """
    start = 0
    while start == 0 or start < len(numbers):
        part = numbers[start:start + size]
        try:
            done, fits = work(part), True
        except torch.OutOfMemoryError:
            if len(part) <= 1:
                raise
            fits = False
        if fits:
            yield part, done
            start += max(1, len(part))
        else:   # Out of the handler, whose traceback keeps the tensors of the attempt.
            torch.cuda.empty_cache()
            size = (len(part) + 1) // 2
            logging.getLogger().warning("out of memory with %d %s at once: going on with %d", len(part), what,
                                        size, extra=EACH)


@contextmanager
def telling_of_memory(device: torch.device, what: str) -> Iterator[None]:
    """A torch.OutOfMemoryError as a ConfigError; ``what``: one of the chunks."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"use_gpu: {device} has not enough memory to score {what} ({reason}); end what "
                          f"else uses it, or set use_gpu: False, which a resumed run may do") from error
