"""What the processes of the tests do; each writes what it found, by its number."""

import os
import signal
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from recbole_mmdiff import distributed, quick_start
from recbole_mmdiff.storage import save_plain
from recbole_mmdiff.trainer.steps import Stepper

CPU = torch.device("cpu")
WIDTH = 3


def save(found, folder: str, name: str) -> None:
    save_plain(found, Path(folder) / f"{name}-{distributed.rank()}.pth")


def runs(settings: dict[str, dict], folder: str) -> None:
    """Train each of the named settings, and write the losses of all its steps, and how often rows were
    shared out."""
    torch.set_num_threads(1)
    losses, shared = [], []
    step, gathered = Stepper.step, distributed._Gathered.forward

    def telling_step(*args):
        losses.append(float(loss := step(*args)))
        return loss

    def telling_gathered(ctx, mine, count):
        shared.append(count)
        return gathered(ctx, mine, count)

    Stepper.step, distributed._Gathered.forward = telling_step, staticmethod(telling_gathered)
    try:
        with distributed.joined(CPU):
            for name, keys in settings.items():
                losses.clear()
                shared.clear()
                made = quick_start.run(config_dict=keys, output=Path(folder) / name, console=False)
                save({"losses": list(losses), "shared": list(shared), "metrics": made.metrics["test"],
                      "weights": made.model.state_dict(), "history": made.metrics["history"]}, folder, name)
    finally:
        Stepper.step, distributed._Gathered.forward = step, staticmethod(gathered)


def network() -> nn.Module:
    """A table whose rows a network takes, and which the loss reads beside."""
    torch.manual_seed(2)
    return nn.ModuleDict({"table": nn.Embedding(9, WIDTH), "layer": nn.Linear(WIDTH, WIDTH),
                          "unused": nn.Linear(2, 2)}).double()


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Of rows that are compared with one another, and with a function of the same weights."""
    made = distributed.by_parts(lambda x: torch.tanh(model["layer"](x)), model["table"](rows))
    similar = functional.log_softmax(made @ made.T, -1).diagonal().mean()
    return similar + model["layer"](model["table"].weight).square().mean()


def pieces(folder: str) -> None:
    """The functions of ``distributed`` by themselves."""
    with distributed.joined(CPU):
        found, rank = {}, distributed.rank()
        for name, count in (("odd", 7), ("one", 1)):
            model = network()
            with distributed.working_together():
                loss_of(model, torch.arange(count)).backward()
            distributed.join_gradients(model.parameters())
            found[name] = {key: value.grad for key, value in model.named_parameters()}
        for dtype in (torch.bool, torch.bfloat16, torch.int64, torch.float64):
            whole = (torch.arange(10).view(5, 2) % 3).to(dtype)
            found[str(dtype)] = distributed.gathered(whole[distributed.part_of(5)], 5)
        one, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
        one.grad = torch.full((2,), float(rank))
        if rank:
            other.grad = torch.full((2,), 4.0)
        turned = nn.Parameter(torch.ones(2, 3).T)
        turned.grad = (rank + torch.arange(6.).view(2, 3)).T
        distributed.average_gradients([one, other, nn.Parameter(torch.ones(1)), turned])
        found["average"] = [one.grad, other.grad, turned.grad.T.flatten()]
        model = nn.Linear(2, 2)
        distributed.same_weights(model)
        found["same"] = model.state_dict()
        found["text"] = distributed.from_first(f"földer {rank}")
        with distributed.first_alone():
            place = Path(folder) / "made by the first"
            found["was there"] = place.exists()
            place.touch()
        save(found, folder, "pieces")


def fail_in_one() -> None:
    """The second process fails with what nobody expected, while the first waits for it."""
    with distributed.joined(CPU):
        if distributed.rank() == 1:
            raise KeyError("nobody expected")
        distributed.gathered(torch.zeros(1), 2)


def lose_one(folder: str) -> None:
    """The second process is killed while the first waits for it."""
    with distributed.joined(CPU):
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            distributed.gathered(torch.zeros(1), 2)
        except Exception as error:
            (Path(folder) / "told").write_text(str(error), encoding="utf-8")
            raise
