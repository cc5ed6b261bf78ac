"""What a worker does: one cell, or all trials of one study. Both go on where they were killed."""

import json
import math
import platform
import shutil
import traceback
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch

from recbole_mmdiff import __version__
from recbole_mmdiff.compare.identity import WHERE, without
from recbole_mmdiff.compare.space import suggest_values
from recbole_mmdiff.config import Config
from recbole_mmdiff.config.sources import merge, read_yaml
from recbole_mmdiff.errors import CheckpointError, ConfigError, DataError, FolderInUse, WriteError
from recbole_mmdiff.files import make_folder, write_json
from recbole_mmdiff.quick_start import CONFIG, MAY_CHANGE, METRICS, run
from recbole_mmdiff.report.plan import read_object
from recbole_mmdiff.report.results import ERROR, RECORD

#: of every cell, unless the comparison says otherwise
QUIET = {"show_progress": False, "log_tensorboard": False, "save_per_user": True,
         "keep_data": False}


def run_cell(job: dict) -> dict:
    """Run the cell of a job, with the best keys of its study if it has one.

    Args:
        job: ``folder``, ``keys``, ``files``, ``overrides``, ``threads``; ``study`` (None, or its
            ``folder``, ``trials`` and ``bigger``); ``gpu_id`` if there are several.

    Returns:
        ``{"seconds"}``, or ``{"error"}`` with what ``error.json`` of the folder holds, too.
    """
    torch.set_num_threads(job["threads"])
    folder, started = Path(job["folder"]), perf_counter()
    try:
        tuned = best_keys(**job["study"]) if job["study"] else {}
        keys = merge(job["keys"], tuned)
        config = cell_config(keys, job["files"], job["overrides"])
        if not (folder / METRICS).is_file():
            _run_or_resume(job, keys, folder)
        _record(folder, job, tuned, str(config["device"]))
        (folder / ERROR).unlink(missing_ok=True)
        return {"seconds": perf_counter() - started}
    except Exception as error:
        return _record_error(folder, error)


def is_finished(folder: Path) -> bool:
    """Whether a cell is done, its record included."""
    return (folder / METRICS).is_file() and (folder / RECORD).is_file()


def run_study(job: dict) -> dict:
    """Run all trials of a study, one after another, on validation data alone.

    A trial that is on disk with a score is not run again: its values are suggested anew by the same
    sampler, which depends on the seed and the trials before, so that a study that was killed goes
    on as if it had not been. Trial 0 takes the defaults. Equal values are tried once.

    Args:
        job: as of ``run_cell``, with ``space``, ``trials``, ``seed`` and ``bigger``.
    """
    torch.set_num_threads(job["threads"])
    started = perf_counter()
    try:
        scores = _all_trials(job)
    except Exception as error:
        return _message(error)
    if all(score is None for score in scores.values()):
        return {"error": f"all {job['trials']} trials failed; see {job['folder']}"}
    return {"seconds": perf_counter() - started}


def _all_trials(job: dict) -> dict[str, float | None]:
    """Tried keys, as text -> validation score."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=job["seed"], n_startup_trials=5)
    study = optuna.create_study(direction="maximize" if job["bigger"] else "minimize",
                                sampler=sampler)
    scores: dict[str, float | None] = {}
    for number in range(job["trials"]):
        trial = study.ask() if number else None
        values = suggest_values(trial, job["space"]) if number else {}
        name = json.dumps(values, sort_keys=True)
        score = scores[name] = _trial_score(job, number, values, scores.get(name))
        if trial is not None:
            state = None if score is not None else optuna.trial.TrialState.FAIL
            study.tell(trial, score, state=state)
    return scores


def best_keys(folder: str, trials: int, bigger: bool) -> dict:
    """The keys of the trial with the best validation score; the first of equal ones."""
    paths = [_trial_file(Path(folder), number) for number in range(trials)]
    found = [read_object(path) for path in paths if path.is_file()]
    scored = [trial for trial in found if trial["score"] is not None]
    best = (max if bigger else min)(scored, key=lambda trial: trial["score"])
    return best["keys"]


def _trial_score(job: dict, number: int, values: dict, known: float | None) -> float | None:
    """The validation score of a trial: on disk, ``known`` from equal values, or of a run."""
    path = _trial_file(Path(job["folder"]), number)
    folder = path.with_suffix("")
    if path.is_file():
        saved = read_object(path)
        # One that failed may do so no more; one of other values is of another sampler.
        if saved["score"] is not None and saved["keys"] == values:
            shutil.rmtree(folder, ignore_errors=True)    # What a kill right after the score left of it.
            return saved["score"]
    if known is not None:
        write_json({"keys": values, "score": known, "seconds": 0.0}, path)
        return known
    try:
        finished = _run_or_resume(job, merge(job["keys"], values), folder, test=False)
        config = finished.config
        score = finished.metrics["valid"][config.valid_pass][config.valid_key]
        trial = {"keys": values, "score": score if math.isfinite(score) else None,
                 "seconds": finished.metrics["seconds"]["training"]}
    except Exception as error:
        trial = {"keys": values, "score": None, **_message(error)}
    write_json(trial, path)
    shutil.rmtree(folder, ignore_errors=True)
    return trial["score"]


def _trial_file(folder: Path, number: int) -> Path:
    return folder / f"trial-{number:03}.json"


def _run_or_resume(job: dict, keys: dict, folder: Path, test: bool = True):
    overrides = {**job["overrides"], **{key: job[key] for key in ("gpu_id",) if key in job}}
    options = {"test": test, "console": False}
    if (folder / CONFIG).is_file() and not (folder / METRICS).is_file():
        # Where the data lie and what device there is may have changed since it was killed.
        wanted = cell_config(keys, job["files"], overrides).plain_run_dict()
        moved = {key: wanted[key] for key in WHERE & MAY_CHANGE & wanted.keys()}
        try:
            if without(read_yaml(folder / CONFIG), WHERE) == without(wanted, WHERE):
                return run(resume=folder, overrides=moved, **options)
        except FolderInUse:
            raise   # Somebody has gone on with it by hand: what is in it is not ours to remove.
        except (CheckpointError, ConfigError, DataError):
            pass    # A model that cannot go on, or a file cut off by the kill: anew.
    shutil.rmtree(folder, ignore_errors=True)
    return run(config_files=job["files"], config_dict=merge(QUIET, keys), overrides=overrides,
               output=folder, **options)


def cell_config(keys: dict, files: list, overrides: dict) -> Config:
    """The configuration of a cell, as ``run_cell`` will build it.

    Raises:
        ConfigError: it asks for several processes.
    """
    config = Config(config_file_list=list(files), config_dict=merge(QUIET, keys), overrides=overrides)
    if config["world_size"] > 1:
        raise ConfigError("nproc, world_size: a comparison runs each cell in one process; leave them out, "
                          "and run cells side by side (--workers, --gpus)")
    return config


def _record(folder: Path, job: dict, tuned: dict, device: str) -> None:
    """``cell.json``: what a run folder does not say."""
    write_json({
        "model": job["label"], "setting": job["setting"], "table": job["table"],
        "trials": job["study"]["trials"] if job["study"] else None, "tuned": tuned,
        "threads": job["threads"], "workers": job["workers"], "device": device,
        "versions": {"recbole_mmdiff": __version__, "python": platform.python_version(),
                     **{name: version(name) for name in ("recbole", "torch", "numpy")}}},
        folder / RECORD)


def _record_error(folder: Path, error: Exception) -> dict:
    """Also leaves the error in ``error.json``."""
    message = _message(error)
    with suppress(WriteError):      # A full disk, which the answer tells.
        make_folder(folder)
        write_json({**message, "traceback": traceback.format_exc()}, folder / ERROR)
    return message


def _message(error: Exception) -> dict:
    return {"error": f"{type(error).__name__}: {error}"}
