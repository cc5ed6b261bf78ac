"""Synthetic results stores: known numbers in the files that ``recbole-mmdiff compare`` writes."""

import hashlib
import json

import numpy as np

RATING = ["rating.mae", "rating.rmse"]
RANKING = ["ranking_full.ndcg@20", "ranking_full.hit@20"]
TABLES = {"rating": {"metrics": RATING}, "ranking": {"metrics": RANKING}}
MODELS = ["DiffCDR", "EMCDR", "CMF", "MF"]
SETTINGS = ["β=20%", "β=50%", "β=80%"]
SEEDS = [2020, 2021, 2022]


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def write_plan(store, cells, models=MODELS, settings=SETTINGS, seeds=SEEDS, tables=TABLES, **more):
    plan = {"format": 1, "name": "ml1m-cold-start", "models": list(models), "settings": list(settings),
            "seeds": list(seeds), "tables": tables, "cells": cells, "ours": None, "published": None}
    write_json(store / "plan.json", plan | more)


def cell(model, setting, table, seed, sweep=None, trials=None):
    """A planned run; its folder does not say what it is, as a hash would not."""
    name = hashlib.sha256(repr((model, setting, table, seed, sweep)).encode()).hexdigest()[:12]
    return {"model": model, "setting": setting, "table": table, "seed": seed, "folder": f"cells/{name}",
            "sweep": sweep, "trials": trials}


def history(stages, epochs, level):
    return [{"stage": stage, "epoch": epoch, "loss": [0.6 * value, 0.4 * value], "seconds": 1.0,
             "valid_score": None if stage == "pretraining" else value / 2}
            for stage in stages for epoch in range(epochs) for value in [level + 1 / (1 + epoch)]]


def finish(store, cell, values, per_user=None, stages=("pretraining", "training"), epochs=12):
    """Write a finished run.

    Args:
        values: metric -> number or None.
        per_user: pass -> (tokens, metric -> values), or None for no file.
    """
    test = {}
    for metric, value in values.items():
        name, _, key = metric.partition(".")
        test.setdefault(name, {})[key] = value
    level = next((value for value in values.values() if value is not None), 0.5)
    write_json(store / cell["folder"] / "metrics.json", {
        "model": cell["model"], "dataset": "tgt", "seed": cell["seed"], "valid": test, "test": test,
        "groups": {"cold_users": test}, "best_epoch": 3, "history": history(stages, epochs, level),
        "seconds": {"training": 12.5, "evaluation": 1.5},
        "throughput": {"training": 1000.0, "evaluation": 50.0}})
    if per_user:
        arrays = {}
        for name, (tokens, columns) in per_user.items():
            arrays[f"{name}.user"] = np.array(tokens)
            arrays |= {f"{name}.{key}": np.array(value) for key, value in columns.items()}
        np.savez_compressed(store / cell["folder"] / "per_user.npz", **arrays)


def fail(store, cell, text="the training loss is NaN"):
    write_json(store / cell["folder"] / "error.json", {"error": text})


def users_of(draw, level, metrics, count, spread=0.1):
    """(tokens in any order, metric -> values) whose means are about ``level``."""
    tokens = np.array([f"u{number:04}" for number in range(count)])
    taste = np.random.default_rng(1).normal(0, spread, count)  # The same for all models.
    order = draw.permutation(count)
    return tokens[order], {metric.partition(".")[2]: level + taste[order] + draw.normal(0, spread, count)
                           for metric in metrics}


def full_store(store, models=MODELS, settings=SETTINGS, seeds=SEEDS, tables=TABLES, users=40,
               stages=("pretraining", "training"), **more):
    """Every run done: the m-th model is the m-th best; values differ by setting and seed."""
    draw, cells = np.random.default_rng(3), []
    for table, content in tables.items():
        for at, model in enumerate(models):
            for place, setting in enumerate(settings):
                for seed in seeds:
                    run = cell(model, setting, table, seed, trials=10 * at)
                    smaller = table == "rating"
                    level = 0.75 + (1 if smaller else -1) * (0.03 * at + 0.05 * place)
                    per_user = users_of(draw, level, content["metrics"], users)
                    values = {metric: float(np.mean(per_user[1][metric.partition(".")[2]]))
                              for metric in content["metrics"]}
                    name = content["metrics"][0].partition(".")[0]
                    finish(store, run, values, {name: per_user}, stages)
                    cells.append(run)
    write_plan(store, cells, models, settings, seeds, tables, **more)
    return cells


def add_sweep(store, cells, model, key, values, settings=SETTINGS, seeds=SEEDS, table="rating"):
    """Sweep cells with values of their own; returns all cells."""
    draw = np.random.default_rng(5)
    for number, value in enumerate(values):
        for setting in settings:
            for seed in seeds:
                run = cell(model, setting, table, seed, {"model": model, "key": key, "value": value})
                level = 0.8 + 0.02 * (number - len(values) / 2)**2 + 0.05 * settings.index(setting)
                finish(store, run, {metric: level + draw.normal(0, 0.01)
                                    for metric in TABLES[table]["metrics"]})
                cells.append(run)
    return cells


def write_embeddings(store, count=60, kinds=("truth", "source", "DiffCDR", "EMCDR"),
                     panels=("ml-1m", "Amazon"), size=8):
    draw = np.random.default_rng(0)
    vectors = [draw.normal(number, 1, (count, size)) for _ in panels for number in range(len(kinds))]
    np.savez_compressed(
        store / "embeddings.npz", vectors=np.concatenate(vectors),
        kind=np.tile(np.repeat(kinds, count), len(panels)), panel=np.repeat(panels, count * len(kinds)))
