"""One run: data, model, training, evaluation, and the folder that keeps them."""

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from recbole.data.transform import construct_transform
from recbole.utils import init_seed

from dataset_prep import ml100k
from recbole_mmdiff import distributed
from recbole_mmdiff.config import DOMAINS, Config
from recbole_mmdiff.config.processes import environment
from recbole_mmdiff.config.sources import merge, read_yaml
from recbole_mmdiff.data.keeping import KEPT, check_kept, keep_data, kept_keys
from recbole_mmdiff.data.preparation import Parts, prepare_parts
from recbole_mmdiff.data.splits import SavedSplit
from recbole_mmdiff.errors import ConfigError, DataError
from recbole_mmdiff.evaluator import Evaluation, make_evaluator
from recbole_mmdiff.files import read_json, write_atomically, write_json
from recbole_mmdiff.launching import run_processes
from recbole_mmdiff.run_folder import CHECKPOINT, CONFIG, METRICS, SPLIT, open_run_folder
from recbole_mmdiff.run_log import kept_messages, log_to
from recbole_mmdiff.trainer import make_trainer
from recbole_mmdiff.trainer.checkpoint import load_checkpoint, restoring, saved_config

#: what a resumed run may do otherwise: where and how long it runs, and what it shows
MAY_CHANGE = {"epochs", "stopping_step", "checkpoint_interval", "data_path", "gpu_id", "use_gpu",
              "worker", "state", "show_progress", "log_tensorboard", "log_wandb", "save_per_user",
              "eval_chunk_elements", "keep_data", "nproc", "world_size", "group_offset", "ip", "port"}


@dataclass
class Run:
    """A finished run: its folder, what ``metrics.json`` holds, and the trained model."""

    folder: Path
    metrics: dict
    model: torch.nn.Module
    parts: Parts
    config: Config


def run(model=None, dataset=None, config_files=(), config_dict=None, overrides=None,
        output: str | Path | None = None, resume: str | Path | None = None,
        test: bool = True, console: bool = True) -> Run | None:
    """Train and evaluate one model, in this process and those that were started with it (torchrun), or
    in ``nproc`` new ones.

    Args:
        model, dataset, config_files, config_dict, overrides: as in ``Config``.
        output: the run folder; must not hold another run.
        resume: the folder of a run to go on with; its ``config.yaml`` is the configuration.
        test: False leaves the test data alone (a trial of tuning): ``metrics.json`` has none then.
        console: whether the log is shown, too.

    Returns:
        the run; None on a machine whose processes (``nproc``) are not the first ones.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError, WriteError: what is wrong, and what to do.
        ProcessError: one of several processes has ended.
    """
    if resume is not None:
        config_files = (_file_of_run(resume, CONFIG), *config_files)
    config = Config(model, dataset, list(config_files), config_dict, overrides)
    if config["world_size"] > 1 and distributed.launched() == 1:
        arguments = {"model": model, "dataset": dataset, "config_files": config_files,
                     "config_dict": config_dict, "overrides": overrides, "output": output, "resume": resume,
                     "test": test, "console": console}
        folder = run_processes(_run_to_folder, arguments, config["nproc"], environment(config),
                               config["group_offset"])
        return None if config["group_offset"] else load_run(folder)
    with distributed.joined(config["device"]):
        if not distributed.is_first():
            return _run_in(Path(distributed.from_first("")), config, resume is not None, test, console)
        with open_run_folder(config, output or config["output"], resume) as folder:
            distributed.from_first(str(folder.resolve()))
            return _run_in(folder, config, resume is not None, test, console)


def _run_to_folder(**arguments) -> str:
    return str(run(**arguments).folder)


def _run_in(folder: Path, config, resume: bool, test: bool, console: bool) -> Run:
    """The part of one of the processes."""
    if resume:
        if (folder / METRICS).is_file():
            raise ConfigError(f"--resume: {folder} is finished, its results are in {folder / METRICS}")
        _refuse_changes(config, folder)
    with kept_messages(config) as messages:
        parts = prepare_data(config)
        if resume:
            _refuse_another_split(parts, folder)
        model = build_model(config, parts)
    # The log begins only now: a mistake in keys or data leaves nothing behind.
    handlers = log_to(folder, config, console)
    for message, handler in itertools.product(messages, handlers):
        handler.handle(message)
    try:
        return _train_and_evaluate(config, parts, model, folder, resume, test)
    except Exception as error:
        if len(handlers) > 1:
            logging.getLogger().removeHandler(handlers[-1])  # The caller shows it on the console.
        logging.getLogger().error("%s: %s", type(error).__name__, error)
        raise
    finally:
        for handler in handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()


def _file_of_run(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        hint = " but a comparison: each run of it is in a folder of cells/" \
            if (path.parent / "plan.json").is_file() else ""
        raise ConfigError(f"there is no {name} in {folder}, so it holds no run{hint}")
    return path


def _refuse_changes(config, folder: Path) -> None:
    """Another model, split or learning rate halfway would make numbers that no run can give. What the
    checkpoint was made with counts: a ``config.yaml`` can be edited."""
    checkpoint = (folder / CHECKPOINT).is_file()
    path = folder / (CHECKPOINT if checkpoint else CONFIG)
    before = _fixed(saved_config(path) if checkpoint else read_yaml(path))
    now = _fixed(config.plain_run_dict())
    with restoring(path):       # A checkpoint may hold anything in the place of a value.
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"--resume: {path}: {changed[0]} was {before.get(changed[0])!r} and cannot change in the "
            f"middle of a run, only {sorted(MAY_CHANGE)} can; start a new run instead")


def _fixed(keys: dict) -> dict:
    """Those that may not change, of each domain, too."""
    return {key: _fixed(value) if isinstance(value, dict) else value
            for key, value in keys.items() if key not in MAY_CHANGE}


def _refuse_another_split(parts: Parts, folder: Path) -> None:
    """A resumed run holds out whom it held out before."""
    saved, path = getattr(parts.observed, "saved_split", None), folder / SPLIT
    if saved is None or not path.is_file():
        return
    try:
        before = SavedSplit.load(path)
    except DataError as error:
        raise DataError(f"--resume: {path} is damaged ({error}); remove it if files and keys are those "
                        f"of the start, which give the same split") from error
    if not saved.equals(before):
        raise DataError(f"--resume: the data no longer give the split in {folder / SPLIT}: files or "
                        f"keys were changed since the run began")


def ensure_default_data(config) -> None:
    """Make the embedded default domains if the configuration names one and it is not there yet."""
    names = {config.for_domain(domain)["dataset"] for domain in DOMAINS} \
        if config.cross_domain else {config["dataset"]}
    if names & {ml100k.SOURCE, ml100k.TARGET}:
        ml100k.ensure(Path(config.data_root))


def prepare_data(config) -> Parts:
    """The parts of a configuration's data; makes the embedded default domains on their first use."""
    with distributed.first_alone():
        ensure_default_data(config)
    return _parts(config)


def _parts(config) -> Parts:
    init_seed(config["seed"], config["reproducibility"])
    return prepare_parts(config)


def build_model(config, parts: Parts) -> torch.nn.Module:
    """The model on its device, its weights drawn from the run's seed."""
    try:
        construct_transform(config)     # Leaves keys in the config that BERT4Rec reads.
    except NotImplementedError as error:
        raise ConfigError(f"transform: {error}") from error
    init_seed(config["seed"], config["reproducibility"])
    return config.model_class(config, parts.train).to(config["device"])


def _train_and_evaluate(config, parts: Parts, model, folder: Path, resume: bool,
                        with_test: bool) -> Run:
    logger = logging.getLogger()
    if distributed.is_first():
        _write_what_resumes(config, parts, folder, resume)
    _log_what_runs(config, parts, model)
    evaluator = make_evaluator(config, parts)
    trainer = make_trainer(config, model, evaluator, folder / CHECKPOINT)
    started = perf_counter()
    going_on = resume and (folder / CHECKPOINT).is_file()
    trainer.fit(parts, show_progress=config["show_progress"], resume=going_on)
    trained = perf_counter()
    valid = evaluator.evaluate(model, "valid")
    test = evaluator.evaluate(model, "test", by_group=True) if with_test else Evaluation()
    progress = getattr(trainer, "progress", None)
    history = progress.history if progress else []
    metrics = {
        "model": config["model"], "dataset": config["dataset"], "seed": config["seed"],
        "valid": valid.metrics, "test": test.metrics, "groups": test.groups,
        "best_epoch": progress.best_epoch if progress else None,
        "history": history,
        "seconds": {"training": progress.seconds if progress else trained - started,
                    "evaluation": perf_counter() - trained},
        "throughput": {"training": _training_throughput(history), "evaluation": test.throughput}}
    if distributed.is_first():
        _write_results(folder, config, metrics, test)
    logger.info("test results:\n%s", format_metrics(test.metrics))
    return Run(folder, metrics, model, parts, config)


def _log_what_runs(config, parts: Parts, model) -> None:
    """The keys and data of a run, and what its user may not expect."""
    logger = logging.getLogger()
    logger.info("%s on %s, device %s; set by hand:\n%s", config["model"], config["dataset"],
                config["device"], config.changes() or "  nothing")
    logger.info("split %s%s: %d training, %d validation, %d test interactions",
                parts.observed.config["split_protocol"],
                f" from {config['split_file']}" if config["split_file"] else "",
                len(parts.observed), len(parts.valid), len(parts.test))
    for line in config.without_effect():
        logger.warning(line)
    if "finetune" in parts.aside and not (config["finetune_epochs"]
                                          and hasattr(model, "finetuning_stage")):
        logger.warning("warm_start: %d interactions are set aside for fine-tuning, which is not done "
                       "(finetune_epochs is 0, or %s cannot): test users are cold",
                       len(parts.aside["finetune"]), config["model"])
    if hasattr(model, "cautions"):
        tested = torch.unique(parts.test.inter_feat[parts.test.uid_field])
        for line in model.cautions(tested.to(model.device)):
            logger.warning(line)


def _write_what_resumes(config, parts: Parts, folder: Path, resume: bool) -> None:
    if not resume:
        # The split first: a folder with a configuration can be resumed, and compares it.
        if hasattr(parts.observed, "saved_split"):
            parts.observed.saved_split.save(folder / SPLIT)
        config.save(folder / CONFIG)
    if config["keep_data"] and not kept_keys(folder, config.run_dict):
        logging.getLogger().info("data kept with the run: %.1f MB in %s (keep_data: False keeps none)",
                                 keep_data(parts, folder) / 1e6, folder / KEPT)


def _training_throughput(history: list[dict]) -> float | None:
    """Samples a second in the epochs of the last stage before fine-tuning, validation apart."""
    stages = [entry["stage"] for entry in history if entry["stage"] != "finetune"]
    epochs = [entry for entry in history if stages and entry["stage"] == stages[-1]]
    seconds = sum(entry["seconds"] for entry in epochs)
    return sum(entry["samples"] for entry in epochs) / seconds if seconds else None


def _write_results(folder: Path, config, metrics: dict, test: Evaluation) -> None:
    if config["save_per_user"] and test.per_user:
        with write_atomically(folder / "per_user.npz") as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **test.per_user)
    write_json(metrics, folder / METRICS)


def format_metrics(metrics: dict) -> str:
    """A line for each pass; n/a where the model has no such scores."""
    lines = []
    for name, values in metrics.items():
        text = "n/a" if values is None else "  ".join(
            f"{key} {value:.4f}" for key, value in values.items())
        lines.append(f"  {name:16} {text}")
    return "\n".join(lines)


def load_run(folder: str | Path, checkpoint: str | Path | None = None,
             overrides: dict | None = None) -> Run:
    """A finished run with its data and its trained model, for further evaluation.

    The data are those that the folder keeps, whatever has become of the files that they were read from,
    unless it keeps none or ``overrides`` have a ``data_path``.

    Args:
        folder: of the run.
        checkpoint: another file than the run's own.
        overrides: keys to evaluate with, above the run's own.

    Raises:
        ConfigError, DataError, CheckpointError: as ``run``.
    """
    folder, overrides = Path(folder), overrides or {}
    saved = _file_of_run(folder, CONFIG)
    for name in (METRICS, *([] if checkpoint else [CHECKPOINT])):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} holds a run that is not finished: there is no {name}; go on with it "
                              f"first (--resume={folder})")
    kept = {} if "data_path" in overrides else kept_keys(folder, read_yaml(saved))
    alone = {"nproc": 1, "world_size": -1, "group_offset": 0}
    config = Config(config_file_list=[saved], overrides=merge(merge(kept, alone), overrides))
    if kept:
        check_kept(folder)
    try:
        parts = _parts(config) if kept else prepare_data(config)
    except DataError as error:
        where = f"the data kept in {folder}" if kept else f"{folder} keeps no data (keep_data)"
        raise DataError(f"{error} ({where})") from error
    model = build_model(config, parts)
    load_checkpoint(Path(checkpoint) if checkpoint else folder / CHECKPOINT, config, model)
    try:
        metrics = read_json(folder / METRICS)
    except ValueError as error:
        raise DataError(f"{folder / METRICS}: is not JSON ({error}); copy the run again, or remove it, and "
                        f"--resume={folder} evaluates again") from error
    return Run(folder, metrics, model, parts, config)
