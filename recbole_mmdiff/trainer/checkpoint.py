"""A checkpoint: all that a killed run needs to go on as if nothing had happened."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from recbole_mmdiff.errors import CheckpointError
from recbole_mmdiff.storage import load_plain, save_plain

FORMAT = 1


@dataclass
class Progress:
    """Where a run stands: plain values of the checkpoint.

    ``stage`` and ``epoch`` are the next to be run; ``best_epoch`` is -1 before a validation.
    """

    stage: int = 0
    epoch: int = 0
    best_score: float | None = None
    best_epoch: int = -1
    cur_step: int = 0
    stopped: bool = False
    history: list = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def of(cls, values: dict) -> "Progress":
        """Raises ValueError, TypeError or KeyError for values that no run saved."""
        progress, like = cls(**values), asdict(cls())
        for name in like.keys() - {"best_score", "history"}:
            check_form(f"progress: {name}", values[name], like[name])
        score = progress.best_score
        if min(progress.stage, progress.epoch) < 0 or not (score is None or type(score) in (int, float)):
            raise ValueError(f"progress is {values!r:.80}")
        like = {"stage": "", "epoch": 0, "samples": 0, "seconds": 0.0}
        for entry in progress.history:
            check_form("progress: history", {name: entry[name] for name in like}, like)
        return progress


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """What a state raises that was not saved by this trainer for this run, as a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not hold the state of this run ({type(error).__name__}: "
                              f"{error}); use an earlier checkpoint or train again") from error


def check_form(name: str, value, like) -> None:
    """Raises ValueError unless nested values have the keys, types and, of tensors, shapes of others."""
    if type(value) is not type(like):
        raise ValueError(f"{name} is a {type(value).__name__}, not a {type(like).__name__}")
    if isinstance(like, torch.Tensor):
        if value.shape != like.shape or value.dtype != like.dtype:
            raise ValueError(f"{name} is {value.dtype} of shape {tuple(value.shape)}, not {like.dtype} of "
                             f"shape {tuple(like.shape)}")
    elif isinstance(like, dict):
        if value.keys() != like.keys():
            raise ValueError(f"{name} has the keys {list(value)[:5]}, not {list(like)[:5]}")
        for key in like:
            check_form(f"{name}: {key}", value[key], like[key])
    elif isinstance(like, (list, tuple)):
        if len(value) != len(like):
            raise ValueError(f"{name} has {len(value)} entries, not {len(like)}")
        for number, one in enumerate(like):
            check_form(f"{name}[{number}]", value[number], one)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Raises ValueError or KeyError for the state of another optimiser."""
    check_form("param_groups", state["param_groups"], optimizer.state_dict()["param_groups"])
    optimizer.load_state_dict(state)
    if len({frozenset(values) for values in optimizer.state.values()}) > 1:
        raise ValueError("an optimiser does not keep the same of all parameters")
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if not isinstance(value, torch.Tensor) or value.numel() not in (1, parameter.numel()):
                raise ValueError(f"{name} of an optimiser does not fit a parameter of shape "
                                 f"{tuple(parameter.shape)}")


def random_state(loader=None) -> dict:
    """The state of every generator that training draws from."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(),
             "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if getattr(loader, "generator", None) is not None:
        state["loader"] = loader.generator.get_state()
    return state


def set_random_state(state: dict, loader=None) -> None:
    """Bring every generator back to a saved state."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        there = torch.cuda.device_count()   # Fewer, perhaps, than where it was saved.
        torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"][:there]])
    if "loader" in state and loader is not None:
        loader.generator.set_state(state["loader"].cpu())


def other_parameters(model) -> dict:
    """What RecBole's models keep beside their weights (propagated embeddings, item similarities).
    Some also name submodules there, which the weights hold already."""
    return {name: value for name, value in model.other_parameter().items()
            if not isinstance(value, torch.nn.Module)}


def model_numbers(model) -> dict[str, int | float]:
    """The numbers among a model's attributes: counters, such as the step of MultiVAE's annealing,
    and the seed and epoch of ours."""
    return {name: value for name, value in vars(model).items() if type(value) in (int, float)}


def save_checkpoint(path: Path, config, model, progress: dict, **tensors) -> None:
    """Write a checkpoint of tensors and plain types, whole or not at all.

    Args:
        progress: plain values: stage, epoch, scores, seconds.
        tensors: optimiser, scaler, random states, best weights.
    """
    save_plain({"format": FORMAT, "model": config["model"], "dataset": config["dataset"],
                "config": config.plain_run_dict(), "progress": progress,
                "state_dict": model.state_dict(), "other_parameter": other_parameters(model),
                "numbers": model_numbers(model), **tensors}, path)


def load_checkpoint(path: Path, config, model) -> dict:
    """Read a checkpoint and put its weights into ``model``.

    Raises:
        CheckpointError: missing, truncated or hostile file; another model; other shapes.
    """
    state = _read(path, str(model.device))
    with restoring(path):
        if state["model"] != config["model"]:
            raise CheckpointError(f"{path}: holds the model {state['model']}, the configuration says "
                                  f"{config['model']}; resume it with its own config.yaml")
        load_weights(model, state, path)
    return state


def saved_config(path: Path) -> dict:
    """The configuration that a checkpoint was made with, without data and model; errors as above."""
    state = _read(path)
    with restoring(path):
        return dict(state["config"])


def _read(path: Path, device: str = "cpu") -> dict:
    state = load_plain(path, map_location=device)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a checkpoint of recbole_mmdiff, format {FORMAT}")
    return state


def load_weights(model, state: dict, path: Path) -> None:
    """Raises CheckpointError, naming the first weight that does not fit."""
    try:
        model.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{path}: the weights do not fit {type(model).__name__} on this data "
                              f"({reason}); was it trained on other data or sizes?") from error
    load_other_parameters(model, state["other_parameter"])
    for name in model_numbers(model).keys() & state.get("numbers", {}).keys():
        if type(state["numbers"][name]) not in (int, float):
            raise ValueError(f"numbers: {name} is {state['numbers'][name]!r:.40}")
        setattr(model, name, state["numbers"][name])


def load_other_parameters(model, values: dict) -> None:
    """Raises ValueError for what the model does not keep there."""
    known = getattr(model, "other_parameter_name", ())
    if not values.keys() <= set(known):
        raise ValueError(f"other_parameter has the keys {list(values)[:5]}, not {list(known)[:5]}")
    model.load_other_parameter(values)
