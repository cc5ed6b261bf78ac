"""Vectors for t-SNE pictures, gathered from the runs of a comparison: transferred ones beside true ones
(DiffCDR, Figure 4), or what ``aligned_points`` shows (CCDRec, Figures 4 and 5)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch.nn.functional import pad

from recbole_mmdiff.compare.aligned import Points, aligned_points, aligns_items
from recbole_mmdiff.compare.plan import Comparison
from recbole_mmdiff.config.keys import model_keys
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.files import write_atomically, write_json
from recbole_mmdiff.model.mapping import MappingRecommender
from recbole_mmdiff.model.registry import get_model
from recbole_mmdiff.quick_start import METRICS, Run, build_model, load_run
from recbole_mmdiff.report.embeddings import EMBEDDINGS, SOURCE, TRUTH
from recbole_mmdiff.report.plan import read_object
from recbole_mmdiff.trainer import make_trainer

MADE_FROM = "embeddings.json"
MOST_USERS, FEW_USERS = 1000, 5


def write_embeddings(store: Path, folders: dict[str, Path], evaluations: dict[str, list[int]],
                     users: int | None = None) -> Path:
    """Write ``embeddings.npz``: ``vectors`` (n, size), ``kind`` (n,) and ``panel`` (n,).

    Args:
        store: where the file goes.
        folders: label -> run folder, of mapping models on one split, with one base; or of models that
            ``aligns_items`` knows, whose panels bear the label where there are several.
        evaluations: label -> numbers of function evaluations, for models with a solver.
        users: at most so many in a panel, drawn by the seed of the runs; by default ``MOST_USERS`` of
            mapping models, ``FEW_USERS`` of the others.
    """
    runs = {label: load_run(folder) for label, folder in folders.items()}
    if all(isinstance(run.model, MappingRecommender) for run in runs.values()):
        points = _transferred_points(runs, evaluations, users or MOST_USERS)
    else:
        points = [(f"{label}, {panel}" if len(runs) > 1 else panel, kind, vectors)
                  for label, run in runs.items()
                  for panel, kind, vectors in aligned_points(run, users or FEW_USERS)]
        # A panel holds vectors of one model: columns of zeros leave its distances as they are.
        size = max(vectors.shape[1] for _, _, vectors in points)
        points = [(panel, kind, pad(vectors, (0, size - vectors.shape[1])))
                  for panel, kind, vectors in points]
    return _save(store / EMBEDDINGS, points)


def check_models(comparison: Comparison) -> None:
    """Raises ConfigError for a model that has nothing to show, or no solver to vary, for models that
    show different things, or where no table has them all."""
    wanted = comparison.embeddings
    classes = {label: get_model(comparison.models[label].get("model", label))
               for label in wanted["models"]}
    maps = {label: issubclass(model_class, MappingRecommender) for label, model_class in classes.items()}
    for label, model_class in classes.items():
        if not maps[label] and not aligns_items(model_class):
            raise ConfigError(f"embeddings: {label} carries no vector from one space to another, and infers "
                              f"no pools of negatives; leave it out")
        if label in wanted["evaluations"] and "num_evaluations" not in model_keys(model_class):
            raise ConfigError(f"embeddings: evaluations: {label} has no num_evaluations; leave it out")
    if len(set(maps.values())) > 1:
        raise ConfigError(f"embeddings: models: {[label for label in maps if maps[label]]} carry users "
                          f"between domains, {[label for label in maps if not maps[label]]} align items; "
                          f"leave out the ones or the others")
    if not any(set(wanted["models"]) <= set(table["models"]) for table in comparison.tables.values()):
        raise ConfigError(f"embeddings: no table has all of {wanted['models']}")


def gather_embeddings(comparison: Comparison, jobs: list[dict], store: Path, threads: int) -> None:
    """Keep ``embeddings.npz`` up to date: of the first table that has all models, its first setting
    and seed; none where the comparison wants none, or a run failed."""
    wanted, done = comparison.embeddings, store / MADE_FROM
    if wanted:
        table = next(label for label, table in comparison.tables.items()
                     if set(wanted["models"]) <= set(table["models"]))
        first = next(job["cell"] for job in jobs if job["table"] == table)
        folders = {job["label"]: Path(job["folder"]) for job in jobs
                   if (job["table"], job["setting"], job["cell"].seed)
                   == (table, first.setting, first.seed) and job["label"] in wanted["models"]}
        made_from = {**wanted, "folders": {label: folder.name for label, folder in folders.items()}}
        if done.is_file() and read_object(done) == made_from:
            return
    for path in (done, store / EMBEDDINGS):
        path.unlink(missing_ok=True)
    if wanted and all((folder / METRICS).is_file() for folder in folders.values()):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            write_embeddings(store, {label: folders[label] for label in wanted["models"]},
                             wanted["evaluations"], wanted["users"])
        finally:
            torch.set_num_threads(before)
        write_json(made_from, done)


def _transferred_points(runs: dict[str, Run], evaluations: dict[str, list[int]], users: int) -> Points:
    """(panel, kind, vectors (n, size)): training and test users apart. "truth" is a factorisation that
    was also trained on the target ratings of the held-out users: it is made for the picture, and
    nothing else ever sees it."""
    first = next(iter(runs.values()))
    truth, points = true_target_vectors(first), []
    for title, chosen in _chosen_users(first, users).items():
        panel = f"{title} users"
        points.append((panel, TRUTH, truth[chosen]))
        points += [(panel, label, _transferred(run, chosen)) for label, run in runs.items()]
        for label, counts in evaluations.items():
            panel = f"{label}, {title} users"
            model = runs[label].model
            source = model.in_target_space(model.source_vectors(chosen))
            points += [(panel, SOURCE, source), (panel, TRUTH, truth[chosen])]
            for count in counts:
                run = load_run(runs[label].folder, overrides={"num_evaluations": count})
                points.append((panel, f"{count} evaluations", _transferred(run, chosen)))
    return points


def true_target_vectors(run: Run) -> torch.Tensor:
    """(users, size): target vectors by the base of a mapping model, trained on all target rows.

    It starts from the weights that the run's own base started from, so that the two spaces are
    alike, and goes on for as many epochs.
    """
    parts, config = run.parts, run.config
    rows = [part.inter_feat for part in (parts.train, parts.valid, parts.test)]
    everything = parts.train.copy(Interaction(
        {field: torch.cat([part[field] for part in rows]) for field in rows[0]}))
    model = build_model(config, replace(parts, train=everything))
    source, target = model.pretraining_stages()
    # The number of a stage is part of its seed: the source stays, without epochs.
    model.stages = lambda: [replace(source, epochs=0), target]
    trainer = make_trainer(config, model, None)
    trainer.fit(replace(parts, train=everything, observed=everything), saved=False, verbose=False)
    with torch.no_grad():
        return model.target.user_factors(torch.arange(everything.user_num, device=model.device))


def _chosen_users(run: Run, count: int) -> dict[str, torch.Tensor]:
    """Ids of the overlapping users who train, and of those who are tested."""
    test = run.parts.test.users_with_rows()
    generator = torch.Generator().manual_seed(run.config["seed"])
    chosen = {}
    for title, users in (("training", run.model.overlap_users.cpu()), ("test", test)):
        chosen[title] = users[torch.randperm(len(users), generator=generator)[:count]] \
            .to(run.model.device)
    return chosen


@torch.no_grad()
def _transferred(run: Run, users: torch.Tensor) -> torch.Tensor:
    return run.model.eval().transferred_vectors(users)


def _save(path: Path, points: Points) -> Path:
    arrays = {"vectors": np.concatenate([vectors.cpu().numpy() for _, _, vectors in points]),
              "kind": np.repeat([kind for _, kind, _ in points],
                                [len(vectors) for _, _, vectors in points]),
              "panel": np.repeat([panel for panel, _, _ in points],
                                 [len(vectors) for _, _, vectors in points])}
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    return path
