"""A checkpoint: all that a killed run needs to go on as if nothing had happened."""

import random
from pathlib import Path

import numpy as np
import torch

from recbole_mmdiff.errors import CheckpointError
from recbole_mmdiff.storage import load_plain, save_plain

FORMAT = 1


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
        torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"]])
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
    if state["model"] != config["model"]:
        raise CheckpointError(f"{path}: holds the model {state['model']}, the configuration says "
                              f"{config['model']}; resume it with its own config.yaml")
    load_weights(model, state, path)
    return state


def saved_config(path: Path) -> dict:
    """The configuration that a checkpoint was made with, without data and model; errors as above."""
    return _read(path)["config"]


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
    model.load_other_parameter(state["other_parameter"])
    for name in model_numbers(model).keys() & state.get("numbers", {}).keys():
        setattr(model, name, state["numbers"][name])
