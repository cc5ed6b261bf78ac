"""The processes that train one model together.

Each holds the whole model and takes the same steps, so that the numbers are those of one process.
What costs is shared out: the rows that a network computes (``by_parts``), the users of an evaluation
(``part_of``, ``gathered``), and the batches of RecBole's own models (``average_gradients``). One process
alone needs none of it: then every function here does nothing, or the whole of it.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recbole_mmdiff.errors import ProcessError

#: how long one process waits for another, which may write gigabytes meanwhile
TIMEOUT = timedelta(minutes=30)
#: ``extra`` of a warning that holds for one process alone: each tells its own
EACH = {"each": True}
_SMALL = 2**20      # numbers of a tensor that is copied to be sent with others
_together, _shared_out = False, False


def launched() -> int:
    """How many processes a launcher, torchrun say, has started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if launched() > 1 else 0


def local_size() -> int:
    """How many processes of this run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched()))


def size() -> int:
    """How many processes have joined."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes that the launcher has started, who find each other by its environment.

    Args:
        device: of this process; tensors on the CPU go over gloo, those on a GPU over nccl.

    Raises:
        ProcessError: they cannot be found.
    """
    if launched() == 1 or size() > 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"WORLD_SIZE is {launched()}, but the other processes cannot be found ({error}); "
                           f"start them with torchrun, or with nproc") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _telling_of_the_dead() -> Iterator[None]:
    """What a connection says when another process ends, in words that help."""
    try:
        yield
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except RuntimeError as error:
        raise ProcessError(
            f"process {rank()} of {size()}: another process has ended, or has not answered for "
            f"{TIMEOUT.seconds // 60} minutes; its own message says why, --resume=FOLDER goes on "
            f"({str(error).splitlines()[0]})") from error


# ---- rows ------------------------------------------------------------------------------------------


def part_of(count: int) -> slice:
    """Which of ``count`` rows are this process's: all of them where there are fewer than processes."""
    if count < size():
        return slice(0, count)
    return _bounds(count, rank())


def _bounds(count: int, number: int) -> slice:
    return slice(count * number // size(), count * (number + 1) // size())


def gathered(mine: Tensor, count: int) -> Tensor:
    """(count, ...): the rows of all processes in their order, each giving those of ``part_of(count)``."""
    if size() == 1 or count < size():
        return mine
    parts = [_bounds(count, number) for number in range(size())]
    lengths = [part.stop - part.start for part in parts]
    padded = mine.new_zeros(max(lengths), *mine.shape[1:])
    padded[:len(mine)] = mine
    # As bytes: backends differ in the types that they know.
    sent = padded.reshape(len(padded), -1).view(torch.uint8)
    received = [torch.empty_like(sent) for _ in lengths]
    with _telling_of_the_dead():
        dist.all_gather(received, sent)
    rows = torch.cat([part[:length] for part, length in zip(received, lengths, strict=True)])
    return rows.view(mine.dtype).reshape(count, *mine.shape[1:])


@contextmanager
def working_together() -> Iterator[None]:
    """While all processes do the same with the same rows, so that they can share them out."""
    with _switched(True):
        yield


@contextmanager
def _switched(together: bool) -> Iterator[None]:
    global _together
    before, _together = _together, together
    try:
        yield
    finally:
        _together = before


def by_parts(compute: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """``compute(*rows)`` of a function that treats each row by itself, a part of them in each process.

    Inside of ``working_together`` the results are gathered with their gradient: what follows is done by all
    alike, so that each process takes the gradient of its own rows, times the number of processes, and
    ``join_gradients`` makes that of all. Elsewhere, and for fewer rows than processes, all are computed
    here.

    Args:
        compute: from tensors (n, ...) to a tensor (n, ...), row by row.
        rows: tensors (n, ...), the same in all processes.
    """
    count = len(rows[0])
    if not _together or size() == 1 or count < size():
        return compute(*rows)
    own = part_of(count)
    global _shared_out
    _shared_out = True
    with _switched(False):
        mine = compute(*(values[own] for values in rows))
    return _Gathered.apply(mine, count)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mine: Tensor, count: int) -> Tensor:
        ctx.count = count
        return gathered(mine, count)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient[part_of(ctx.count)] * size(), None


# ---- weights ---------------------------------------------------------------------------------------


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make each gradient the mean over the processes; a missing one counts as zero if any has it."""
    if size() == 1:
        return
    parameters = [value for value in parameters if value.requires_grad]
    with torch.no_grad(), _telling_of_the_dead():
        has = torch.tensor([value.grad is not None for value in parameters], dtype=torch.uint8)
        dist.all_reduce(has, dist.ReduceOp.MAX)
        wanted = [value for value, some in zip(parameters, has.tolist(), strict=True) if some]
        for value in wanted:
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad.div_(size())
        _in_few_pieces([value.grad for value in wanted], dist.all_reduce)


def _in_few_pieces(values: list[Tensor], collective: Callable[[Tensor], object]) -> None:
    """A collective of tensors in place; small ones go side by side, as each call takes a round trip."""
    kinds: dict[tuple, list[Tensor]] = {}
    for value in values:
        alone = value.numel() > _SMALL and value.is_contiguous()
        kinds.setdefault((value.dtype, value.device, id(value) if alone else None), []).append(value)
    for group in kinds.values():
        if len(group) == 1 and group[0].is_contiguous():
            collective(group[0])
            continue
        piece = torch.cat([value.reshape(-1) for value in group])
        collective(piece)
        parts = piece.split([value.numel() for value in group])
        for value, part in zip(group, parts, strict=True):
            value.copy_(part.view_as(value))


def join_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """``average_gradients`` if anything was computed ``by_parts`` since; else they are alike already."""
    global _shared_out
    if _shared_out:
        average_gradients(parameters)
        _shared_out = False


def averaging(optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
    """The same optimiser, which averages the gradients of the processes before each of its steps."""
    if optimizer is not None and size() > 1:
        optimizer.register_step_pre_hook(lambda optimizer, *_: average_gradients(parameters_of(optimizer)))
    return optimizer


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What an optimiser steps."""
    return [value for group in optimizer.param_groups for value in group["params"]]


def same_weights(module: nn.Module) -> None:
    """Give every process the first one's weights and buffers."""
    if size() == 1:
        return
    with torch.no_grad(), _telling_of_the_dead():
        values = [value for value in module.state_dict().values()
                  if isinstance(value, Tensor) and value.layout == torch.strided]
        _in_few_pieces(values, partial(dist.broadcast, src=0))


# ---- who writes ------------------------------------------------------------------------------------


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process does the block while the others wait, then they do: what it made is there."""
    if size() == 1:
        yield
        return
    if not is_first():
        _wait()
    yield
    if is_first():
        _wait()


def _wait() -> None:
    with _telling_of_the_dead():
        dist.all_reduce(torch.zeros(1))     # A barrier would go over the GPUs, if there are any.


def from_first(text: str) -> str:
    """The first process's text, in every process."""
    if size() == 1:
        return text
    sent = torch.tensor(bytearray(text.encode()), dtype=torch.uint8)
    length = torch.tensor([len(sent)])
    with _telling_of_the_dead():
        dist.broadcast(length, 0)
        sent = sent if is_first() else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(sent, 0)
    return bytes(sent.tolist()).decode()
