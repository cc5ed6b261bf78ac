"""``recbole-mmdiff compare``: run all cells of a comparison that have not been run."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from recbole_mmdiff.compare import cells as work
from recbole_mmdiff.compare.embeddings import check_models, gather_embeddings
from recbole_mmdiff.compare.identity import digest, run_identity
from recbole_mmdiff.compare.plan import Cell, Comparison
from recbole_mmdiff.compare.space import examples
from recbole_mmdiff.compare.workers import EXECUTORS, in_processes, on_ray
from recbole_mmdiff.config import PASSES
from recbole_mmdiff.config.sources import merge
from recbole_mmdiff.errors import ConfigError, DataError, FolderInUse, one_of
from recbole_mmdiff.evaluator import GROUPS, SOURCE, ranks_both
from recbole_mmdiff.files import locked, make_folder, remove_leftovers, write_json
from recbole_mmdiff.report.formats import slug
from recbole_mmdiff.report.plan import FORMAT, PLAN, check_plan
from recbole_mmdiff.report.results import ERROR


def compare(config: str | Path, output: str | Path | None = None, overrides: dict | None = None,
            workers: int = 1, threads: int = 1, executor: str = "processes", gpus: int = 0) -> Path:
    """Run what is missing of a comparison, and write what ``report`` reads.

    A cell is named by all that its numbers follow from (keys, data, search space), so a finished
    one is never run again, and one whose keys have changed is another one. A cell that was killed
    goes on where it was; one that failed is tried again.

    Args:
        config: the comparison file.
        output: the results store; ``runs/<name>`` by default. May hold an earlier part of it.
        overrides: keys of every cell, above all others.
        workers: cells at once.
        threads: of each cell, whatever ``workers`` is, since they change the last bits of a sum.
        executor: ``processes`` or ``ray``.
        gpus: of this machine (``processes``), cells in turn; with ``ray`` 1 for one GPU a cell.

    Returns:
        The store.

    Raises:
        ConfigError, DataError: a mistake anywhere in the comparison, before anything is run.
    """
    one_of("executor", executor, EXECUTORS)
    for name, value, least in (("workers", workers, 1), ("threads", threads, 1), ("gpus", gpus, 0)):
        if value < least:
            raise ConfigError(f"--{name}: {value} is too few, use {least} or more")
    comparison = Comparison.read(config)
    comparison.check_overrides(overrides or {})
    if comparison.tune and find_spec("optuna") is None:
        raise ConfigError("tune: needs optuna; pip install 'recbole-mmdiff[tune]'")
    store = Path(output or Path("runs") / slug(comparison.name)).resolve()
    common = {"overrides": overrides or {}, "threads": threads, "workers": workers}
    jobs = [_job(comparison, cell, common, store) for cell in comparison.cells()]
    plan = _plan(comparison, jobs)
    check_plan(plan, f"{comparison.path}: ")
    if comparison.embeddings:
        check_models(comparison)
    make_folder(store)
    # Two comparisons in one store would run the same cells in the same folders.
    with locked(store / ".lock", FolderInUse(f"--output: {store}: another compare is running in this store; "
                                              f"wait for it, or choose another folder")):
        for folder, *_ in os.walk(store):
            remove_leftovers(folder)
        write_json(plan, store / PLAN)

        def run_all(function: Callable, missing: list[dict], what: str) -> list[tuple[dict, dict]]:
            answers = in_processes(function, missing, workers, gpus) if executor == "processes" \
                else on_ray(function, missing, threads, gpus)
            return _follow(answers, len(missing), what)

        _run_cells(jobs, _run_studies(jobs, run_all), run_all)
        gather_embeddings(comparison, jobs, store, threads)
    return store


def _job(comparison: Comparison, cell: Cell, common: dict, store: Path) -> dict:
    """All that a worker must know of a cell; a mistake in its keys or data is found here."""
    files, overrides = list(cell.files), common["overrides"]
    try:
        config = work.cell_config(cell.keys, files, overrides)
        check_metrics(config, comparison.tables[cell.table]["metrics"])
        identity = run_identity(config)
    except (ConfigError, DataError) as error:
        hint = f" (recbole-mmdiff prepare amazon --preset=... makes the data: {comparison.preset})" \
            if comparison.preset and isinstance(error, DataError) else ""
        raise type(error)(f"{comparison.path}: {cell}: {error}{hint}") from error
    # A worker may stand in another folder.
    common = {**common, "overrides": {**overrides, "data_path": os.path.abspath(config.data_root)}}
    job = {**common, "cell": cell, "label": cell.model, "setting": cell.setting, "table": cell.table,
           "keys": cell.keys, "files": files, "study": None}
    space = comparison.tune.space[cell.model] if comparison.tune and not cell.sweep else {}
    if space:
        job["study"], job["study_job"] = _study(comparison, cell, config, job, space, store)
        identity |= {"study": Path(job["study"]["folder"]).name, "trials": comparison.tune.trials}
    # By what is run, not by its label: what has two labels is one cell.
    job["folder"] = str(store / "cells" / f"{config['model']}-{cell.seed}-{digest(identity)}")
    return job


def check_metrics(config, metrics: list[str]) -> None:
    """A metric that no run computes would be an empty row after hours."""
    passes = list(PASSES)
    if ranks_both(config, config["split_protocol"]):
        passes += [SOURCE + own for own in PASSES]
    for name in metrics:
        kind, _, rest = name.partition(".")
        if kind == "groups":
            group, _, rest = rest.partition(".")
            one_of("metrics: groups", group, GROUPS if config.cross_domain else GROUPS[:4])
            kind, _, rest = rest.partition(".")
        one_of(f"metrics: {name}", kind, (*passes, "throughput", "seconds"))
        one_of(f"metrics: {name}", rest, sorted(_metrics_of(config, kind.removeprefix(SOURCE))))


def _metrics_of(config, kind: str) -> list[str]:
    """The numbers of a part of ``metrics.json``."""
    if kind in ("throughput", "seconds"):
        return ["training", "evaluation"]
    if kind == "rating":
        return [name.lower() for name in config["rating_metrics"]]
    names = ["ndcg", "random_ndcg"] if kind == "ranking_labeled" else \
        [name.lower() for name in config["metrics"]]
    # Some have no cut-off, GAUC for one.
    return names + [f"{name}@{k}" for name in names for k in config["topk"]]


def _study(comparison, cell, config, job, space, store) -> tuple[dict, dict]:
    """The study that a cell takes its keys from, and the job that runs it.

    One study serves all seeds if they share a split. Otherwise each split has its own: users who
    chose the keys on one split are test users of another.
    """
    tune = comparison.tune
    # Whether a value is accepted does not depend on the seed.
    for key, choices in space.items() if cell.seed == comparison.seeds[0] else ():
        for value in examples(choices):
            try:
                work.cell_config(merge(cell.keys, {key: value}), job["files"], job["overrides"])
            except ConfigError as error:
                raise ConfigError(f"{comparison.path}: tune: space: {cell.model}: {error}") from error
    shared = config["split_file"] or config.run_dict["split_seed"] is not None
    keys = merge(cell.keys, {"seed": comparison.seeds[0]}) if shared else cell.keys
    identity = run_identity(config, leave_out=("seed", "split_seed") if shared else ())
    identity["split_seed"] = config.run_dict["split_seed"]
    # Neither trials nor what they are measured in: more trials go on with those that are there.
    name = digest({**identity, "space": space, "tuner": tune.seed, "first seed": keys["seed"]})
    folder = str(store / "studies" / f"{config['model']}-{name}")
    study = {"folder": folder, "trials": tune.trials, "bigger": bool(config["valid_metric_bigger"])}
    common = {key: job[key] for key in ("files", "overrides", "threads", "workers", "label", "setting",
                                        "table")}
    return study, {**common, **study, "keys": keys, "space": space, "seed": tune.seed}


def _plan(comparison: Comparison, jobs: list[dict]) -> dict:
    """``plan.json``: what ``report`` reads."""
    cells = [{"model": job["label"], "setting": job["setting"], "table": job["table"],
              "seed": job["cell"].seed, "sweep": job["cell"].sweep,
              "folder": "cells/" + Path(job["folder"]).name,
              "trials": job["study"]["trials"] if job["study"] else None} for job in jobs]
    return {"format": FORMAT, "name": comparison.name, "models": comparison.labels(),
            "settings": list(comparison.settings), "seeds": comparison.seeds,
            "tables": {label: {"metrics": table["metrics"]}
                       for label, table in comparison.tables.items()},
            "cells": cells, "ours": comparison.ours, "published": comparison.published}


def _run_studies(jobs: list[dict], run_all: Callable) -> dict[str, str]:
    """Run the studies of the cells that are missing; folder -> error of those that failed."""
    studies = {job["study"]["folder"]: job["study_job"] for job in jobs
               if job["study"] and not _is_finished(job)}
    for folder in studies:
        Path(folder).mkdir(parents=True, exist_ok=True)
    answers = run_all(work.run_study, list(studies.values()), "study")
    return {job["folder"]: answer["error"] for job, answer in answers if "error" in answer}


def _run_cells(jobs: list[dict], failed_studies: dict[str, str], run_all: Callable) -> None:
    missing, failed = {}, {}
    for job in jobs:
        study = job["study"]["folder"] if job["study"] else None
        if study in failed_studies:
            failed[job["folder"]] = failed_studies[study]
        elif not _is_finished(job):
            missing.setdefault(job["folder"], {key: value for key, value in job.items()
                                               if key not in ("cell", "study_job")})
    print(f"compare: {len({job['folder'] for job in jobs})} cells, {len(missing)} to run",
          file=sys.stderr, flush=True)
    for job, answer in run_all(work.run_cell, list(missing.values()), "cell"):
        # A worker that was killed could not write down that it was.
        if "error" in answer and not (Path(job["folder"]) / ERROR).is_file():
            failed[job["folder"]] = answer["error"]
    for folder, error in failed.items():
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json({"error": error}, Path(folder) / ERROR)


def _is_finished(job: dict) -> bool:
    return work.is_finished(Path(job["folder"]))


def _follow(answers: Iterator, count: int, what: str) -> list[tuple[dict, dict]]:
    """Print a line for every job that ends, with the time that is left at this pace."""
    started, seen = time.perf_counter(), []
    for job, answer in answers:
        seen.append((job, answer))
        passed = time.perf_counter() - started
        left = passed / len(seen) * (count - len(seen))
        result = answer.get("error") or f"{answer['seconds']:.0f} s"
        print(f"[{what} {len(seen)}/{count}, about {left / 60:.0f} min left] {job['label']}, "
              f"{job['setting']}, {job['table']}, seed {job['keys']['seed']}: {result}",
              file=sys.stderr, flush=True)
    return seen
