"""What is fuzzed: valid files of each kind that the package reads, and the reader of each."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import yaml

from dataset_prep.batches import Encoded
from dataset_prep.output import is_made, read_record, record_path
from dataset_prep.raw import RawFile
from dataset_prep.reviews import JsonReviews, read_rows
from dataset_prep.shards import Plan, Work
from recbole_mmdiff.compare import compare, runner
from recbole_mmdiff.config import Config
from recbole_mmdiff.config.sources import parse_overrides
from recbole_mmdiff.data.atomic import read_atomic
from recbole_mmdiff.data.features import FeatureFile, find_modalities, write_features
from recbole_mmdiff.data.splits import SavedSplit
from recbole_mmdiff.data.text_form import entity_of, is_text_form, read_text_form
from recbole_mmdiff.data.users import link_users
from recbole_mmdiff.quick_start import run
from recbole_mmdiff.recommend import Recommender
from recbole_mmdiff.recommend.new_users import read_new_users
from recbole_mmdiff.report.results import Results
from recbole_mmdiff.trainer import StagedTrainer

USERS, ITEMS = 14, 9
TOKENS = np.array([f"u{number:02}" for number in range(USERS)])


@dataclass(frozen=True)
class Target:
    """Files and their reader.

    Attributes:
        name: of the target.
        files: path in the folder -> kind of its mutations.
        make: writes valid files into an empty folder.
        read: reads all of them.
        named: a pattern of what a message may name instead of the file.
    """

    name: str
    files: dict[str, str]
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    named: str = ""


class _Ended(Exception):
    """Ends a run after its first checkpoint, or a comparison before its first run."""


def _table(path: Path, header: str, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *("\t".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")


def _interactions(prefix: str) -> list[tuple]:
    draw = np.random.default_rng(len(prefix))
    return [(user, f"{prefix}{item}", draw.integers(1, 6), draw.integers(10**6))
            for user in TOKENS for item in sorted(draw.choice(ITEMS, 4, replace=False))]


def _make_pair(folder: Path) -> None:
    for name in ("src", "tgt"):
        place = folder / "data" / name
        _table(place / f"{name}.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float",
               _interactions(name[0]))
        _table(place / f"{name}.item", "item_id:token\ttitle:token_seq\tyear:float\tlook:float_seq",
               [(f"{name[0]}{item}", f"a film {item}", 1990 + item, f"0.{item} -1 2e3")
                for item in range(ITEMS)])
        _table(place / f"{name}.user", "user_id:token\tage:token", [(user, "20-30") for user in TOKENS])
    _table(folder / "links.tsv", "source\ttarget", [(user, user) for user in TOKENS[:-1]])


def _keys(folder: Path, **more) -> dict:
    """The keys of a short run on that pair."""
    columns = {"inter": ["user_id", "item_id", "rating", "timestamp"],
               "item": ["item_id", "title", "year", "look"], "user": ["user_id", "age"]}
    return {"model": "MF", "data_path": str(folder / "data"), "source_domain": {"dataset": "src"},
            "target_domain": {"dataset": "tgt"}, "user_link_file_path": str(folder / "links.tsv"),
            "load_col": columns, "use_gpu": False, "show_progress": False, "log_tensorboard": False,
            "state": "WARNING", "epochs": 2, "embedding_size": 3, "train_batch_size": 64, "topk": [3],
            "test_user_ratio": 0.3, "valid_user_ratio": 0.3, "valid_metric": "NDCG@3", **more}


# ---- tables -----------------------------------------------------------------------------------------


def _read_tables(folder: Path) -> None:
    for path in sorted((folder / "data" / "src").iterdir()):
        required = {".inter": {"user_id", "item_id", "rating"}, ".item": {"item_id"}}.get(path.suffix, set())
        read_atomic(path, None, required, categories=tuple(sorted(required - {"rating"})))


def _make_reviews(folder: Path) -> None:
    rows = [{"reviewerID": user, "asin": item, "overall": float(rating), "unixReviewTime": int(time),
             "reviewText": "a \"film\""} for user, item, rating, time in _interactions("i")]
    (folder / "reviews.json").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def _read_reviews(folder: Path) -> None:
    raw = RawFile(folder / "reviews.json", max_bad=0.5)
    names = {"user_id": "reviewerID", "item_id": "asin", "rating": "overall", "timestamp": "unixReviewTime"}
    for frame in read_rows(raw, JsonReviews(names)):
        frame.to_dicts()
    raw.check_share()


# ---- features, splits, shards -----------------------------------------------------------------------


def _make_features(folder: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(ITEMS, 5)).astype(np.float32)
    write_features(folder, "tgt", "text", [f"t{item}" for item in range(ITEMS)], matrix, encoder="test",
                   entity="item", fields=["title"])


def _read_features(folder: Path) -> None:
    assert find_modalities(folder, "tgt") in ([], ["text"])
    file = FeatureFile.open(folder, "tgt", "text")
    file.align(["[PAD]", *(f"t{item}" for item in range(ITEMS + 1))])
    file.verify()


def _make_text_form(folder: Path) -> None:
    _table(folder / "tgt.look", "item_id:token\temb:float_seq",
           [(f"t{item}", f"{item}.5 -1e-3 {item}") for item in range(ITEMS)])


def _read_text_form(folder: Path) -> None:
    is_text_form(folder / "tgt.look")
    read_text_form(folder / "tgt.look")
    entity_of(folder / "tgt.look")


def _make_split(folder: Path) -> None:
    users, items, *_ = np.array(_interactions("t")[:20]).T
    SavedSplit("cold_start_users", TOKENS[:-2], users, items, np.arange(20) % 3).save(folder / "split.npz")


def _read_split(folder: Path) -> None:
    split = SavedSplit.load(folder / "split.npz")
    users, items, *_ = np.array(_interactions("t")).T
    split.parts(users, items, folder / "split.npz")
    split.digest()


def _work(folder: Path) -> Work:
    return Work(folder, "text", Plan({"encoder": "test", "fields": ["title"]}, list("abcd"), 2, "float32"))


def _make_shards(folder: Path) -> None:
    work = _work(folder)
    work.folder.mkdir()
    work.prepare(restart=False)
    for shard in range(2):
        work.save(shard, Encoded(np.array([0, 1]), np.ones((2, 3)), {}, 1))
    # A name that is the same in every folder.
    shutil.move(work.folder, folder / "shards")


def _read_shards(folder: Path) -> None:
    work = _work(folder)
    shutil.rmtree(work.folder, ignore_errors=True)
    shutil.copytree(folder / "shards", work.folder)
    for suffix in ("npy", "tokens", "json"):
        (folder / f"{folder.name}.text.{suffix}").unlink(missing_ok=True)
    work.is_finished()
    work.prepare(restart=False)
    work.merge({})


def _make_record(folder: Path) -> None:
    place = folder / "toy"
    _table(place / "toy.inter", "user_id:token\titem_id:token", [("a", "b")])
    record_path(place).write_text(json.dumps(
        {"recipe": {"name": "toy", "min": 5}, "files": {"toy.inter": {"rows": 1}}, "features": {"text": {}}}))


def _read_record(folder: Path) -> None:
    read_record(folder / "toy")
    is_made(folder / "toy", {"name": "toy", "min": 5}, overwrite=False)


# ---- configuration ----------------------------------------------------------------------------------


def _make_recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(_keys(folder, learning_rate=0.01)), encoding="utf-8")


def _read_recipe(folder: Path) -> None:
    config = Config(config_file_list=[folder / "recipe.yaml"])
    config.save(folder / "saved.yaml")
    config.changes()
    Config(config_file_list=[folder / "saved.yaml"])


def _make_words(folder: Path) -> None:
    words = ["--model=MF", "--topk=[5, 10]", "--source_domain.dataset=src", "--target_domain.dataset", "tgt",
             "--learning_rate=1e-3", "--eval_args.split={RS: [0.8, 0.1, 0.1]}", "--val_interval=null"]
    (folder / "words.txt").write_text("\n".join(words), encoding="utf-8")


def _read_words(folder: Path) -> None:
    words = (folder / "words.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    Config(overrides=parse_overrides(words))


def _make_comparison(folder: Path) -> None:
    _make_pair(folder)
    content = {
        "name": "small", "keys": _keys(folder), "seeds": [1, 2], "ours": ["EMCDR"], "preset": "toy",
        "models": {"EMCDR": {}, "plain": {"model": "MF", "biases": False}},
        "settings": {"20%": {"overlap_ratio": 0.2}, "all": {}},
        "embeddings": {"models": ["EMCDR"], "users": 5},
        "tables": {"rating": {"metrics": ["rating.mae"], "keys": {"clip_ratings": True}}},
        "sweeps": [{"model": "EMCDR", "key": "reg_weight", "values": [0.0, 0.1]}],
        "tune": {"trials": 2, "seed": 3, "space": {
            "EMCDR": {"reg_weight": {"low": 0.01, "high": 1, "log": True}},
            "plain": {"embedding_size": [2, 3]}}},
        "published": {"source": "a paper", "models": ["EMCDR", "plain"], "tolerance": {"rating.mae": 0.1},
                      "values": {"all": {"rating.mae": [0.8, None]}}}}
    del content["keys"]["model"]
    (folder / "small.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def _read_comparison(folder: Path) -> None:
    """Up to where its store is opened: what is wrong must be told before."""
    with patch.object(runner, "make_folder", side_effect=_Ended), suppress(_Ended):
        compare(folder / "small.yaml", folder / "store")


# ---- runs -------------------------------------------------------------------------------------------


def _make_run(folder: Path) -> None:
    _make_pair(folder)
    run(config_dict=_keys(folder), output=folder / "run", console=False)
    shutil.rmtree(folder / "data")


def _read_run(folder: Path) -> None:
    Recommender.load(folder / "run").recommend(k=2)


def _make_killed(folder: Path) -> None:
    _make_pair(folder)
    save = StagedTrainer._save

    def save_and_die(trainer, loader=None, finished=False):
        save(trainer, loader, finished)
        raise _Ended

    with patch.object(StagedTrainer, "_save", save_and_die), suppress(_Ended):
        run(config_dict=_keys(folder, keep_data=False), output=folder / "killed", console=False)


def _read_killed(folder: Path) -> None:
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.copytree(folder / "killed", folder / "run")
    run(resume=folder / "run", console=False)


def _make_new_users(folder: Path) -> None:
    _make_run(folder)
    rows = [(f"new{number % 3}", f"s{number}", number % 5 + 1) for number in range(ITEMS)]
    _table(folder / "new.inter", "user_id:token\titem_id:token\trating:float", rows)
    text = "\n".join(",".join(map(str, row)) for row in [("user_id", "item_id", "rating"), *rows])
    (folder / "new.csv").write_text(text + "\n", encoding="utf-8")


class _ReadNewUsers:
    """The reader of the users' files; the run is loaded once."""

    def __init__(self):
        self.folder = self.source = None

    def __call__(self, folder: Path) -> None:
        if folder != self.folder:
            self.folder, self.source = folder, Recommender.load(folder / "run").parts.observed.source
        for name in ("new.inter", "new.csv"):
            read_new_users(folder / name, self.source, skip_unknown=True)


def _make_store(folder: Path) -> None:
    cells = [{"model": "MF", "setting": "all", "table": "rating", "seed": seed, "folder": f"cells/{seed}",
              "sweep": None, "trials": 2} for seed in (1, 2)]
    cells.append({**cells[0], "model": "MF reg_weight=1", "folder": "cells/3",
                  "sweep": {"model": "MF", "key": "reg_weight", "value": 1}})
    plan = {"format": 1, "name": "small", "models": ["MF"], "settings": ["all"], "seeds": [1, 2],
            "tables": {"rating": {"metrics": ["rating.mae"]}}, "cells": cells, "ours": ["MF"],
            "published": {"source": "a paper", "models": ["MF"], "tolerance": {"rating.mae": 0.1},
                          "values": {"all": {"rating.mae": [0.8]}}, "note": None}}
    metrics = {"model": "MF", "test": {"rating": {"mae": 0.7}}, "seconds": {"training": 1.5},
               "history": [{"stage": "training", "epoch": 0, "loss": [0.5, 0.1], "valid_score": 0.6}]}
    for name, content in (("plan.json", plan), ("cells/1/metrics.json", metrics),
                          ("cells/1/cell.json", {"threads": 1}), ("cells/2/error.json", {"error": "no"})):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    np.savez(folder / "cells/1/per_user.npz", **{"rating.user": np.array(["a", "b"]),
                                                 "rating.mae": np.array([0.6, 0.8])})


def _read_store(folder: Path) -> None:
    results = Results.load(folder)
    for cell in results.plan.cells:
        results.value(cell, "rating.mae")
        results.value(cell, "seconds.training")
        results.per_user(cell, "rating.mae")
        results.history(cell)


_TABLES = {f"data/src/src.{suffix}": "table" for suffix in ("inter", "item", "user")}
_KEPT = {f"run/data/{place}.{suffix}": "table" for place in ("source/src/src", "target/tgt/tgt")
         for suffix in ("inter", "item", "user")}
TARGETS = [
    Target("tables", _TABLES, _make_pair, _read_tables),
    Target("links", {"links.tsv": "table"}, _make_pair,
           lambda folder: link_users(TOKENS, TOKENS, str(folder / "links.tsv"))),
    Target("reviews", {"reviews.json": "text"}, _make_reviews, _read_reviews),
    Target("features", {"tgt.text.npy": "npy", "tgt.text.tokens": "text", "tgt.text.json": "json"},
           _make_features, _read_features, r"tgt\.text\."),
    Target("text form", {"tgt.look": "table"}, _make_text_form, _read_text_form),
    Target("splits", {"split.npz": "npz"}, _make_split, _read_split),
    Target("shards", {"shards/plan.json": "json", "shards/00000.npz": "npz"}, _make_shards, _read_shards,
           r"\.shards"),
    Target("records", {"toy/toy.prep.json": "json"}, _make_record, _read_record, "/toy: "),
    Target("recipes", {"recipe.yaml": "yaml"}, _make_recipe, _read_recipe),
    Target("words", {"words.txt": "text"}, _make_words, _read_words, "."),
    Target("comparisons", {"small.yaml": "yaml"}, _make_comparison, _read_comparison),
    Target("runs", {"run/config.yaml": "yaml", "run/checkpoint.pth": "state", "run/metrics.json": "json",
                    "run/data/kept.json": "json", "run/data/links.tsv": "table", **_KEPT},
           _make_run, _read_run, "/run/"),
    Target("resumed runs", {"killed/checkpoint.pth": "state", "killed/split.npz": "npz",
                            "killed/config.yaml": "yaml"}, _make_killed, _read_killed, "/(run|data)/"),
    Target("new users", {"new.inter": "table", "new.csv": "text"}, _make_new_users, _ReadNewUsers()),
    Target("results", {"plan.json": "json", "cells/1/metrics.json": "json", "cells/1/cell.json": "json",
                       "cells/1/per_user.npz": "npz", "cells/2/error.json": "json"},
           _make_store, _read_store),
]
