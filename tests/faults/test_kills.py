"""Work that is killed without warning, at random moments and at every kind of place, and gone on with by
what a user would type: it ends, and its files are those of work that was never killed."""

import contextlib
import functools
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from kills import Kind, Server, Tally, contents, differences, outlive, random_deaths, whole_run
from running import RANKING, write_item_features

from dataset_prep.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="kill -9 is a matter of POSIX")

MAPPED = {"pretrain_epochs": 6, "pretrain_batch_size": 64, "epochs": 6, "train_batch_size": 64,
          "eval_step": 2}
PROFILED = {"embedding_size": 8, "hidden_size": 16, "modalities": ["text", "image"], "use_ids": False}
ITEMS = {"embedding_size": 8, "knn_k": 4, "modalities": ["text", "image"], "epochs": 6}
#: model -> keys of a run of a second or so
TRAINED = {
    "DiffCDR": MAPPED,
    "MuSiC": {**MAPPED, **PROFILED, "feature_epochs": 3, "side_epochs": 3,
              "checkpoint_interval": 100},     # Between two stages alone.
    "MMDCDR": {**MAPPED, **PROFILED, "time_embedding_size": 8, "num_evaluations": 6, "diffusion_epochs": 3},
    "SIEOUG": {**ITEMS, "num_clusters": 3, "train_batch_size": 128},
    "CCDRec": {**RANKING, **ITEMS, "num_steps": 6, "curriculum_interval": 1},
    "BPR": {**RANKING, "epochs": 12, "embedding_size": 8},
    # By a loop of RecBole's own.
    "RaCT": {"train_stage": "actor_pretrain", "pretrain_epochs": 6, "save_step": 6},
}
#: kills of each kind: 200
KILLS = {"DiffCDR": 22, "MuSiC": 22, "MMDCDR": 22, "SIEOUG": 20, "CCDRec": 20, "BPR": 10, "RaCT": 10,
         "default data": 14, "amazon": 10, "preset": 8, "mmrec": 12, "encode": 16, "features": 4,
         "compare": 10}
#: places that a change of the code may spoil, as `Whole.places` names them, and whether the file that would
#: be renamed there is cut in half
PLACES = [
    ("DiffCDR", "os.rename run/.split.tmp.npz", True),
    ("DiffCDR", "os.rename run/.config.tmp.yaml", True),
    ("DiffCDR", "os.rename run/data/target/tgt/.tgt.tmp.inter", True),
    ("DiffCDR", "os.rename run/.checkpoint.tmp.pth", True),
    ("DiffCDR", "open run after os.rename run/.checkpoint.tmp.pth", False),
    ("DiffCDR", "os.rename run/.metrics.tmp.json", True),
    ("default data", "os.rename dataset/.prepare/ml0k/ml0k-drama/.ml0k-drama.text.tmp.npy", True),
    ("default data", "os.rmdir dataset/.prepare/ml0k", False),
    ("amazon", "os.rmdir .prepare/left", False),
    ("mmrec", "os.rename new/.new.text.tmp.npy", True),
    ("encode", "os.rename toy/.toy.slow.tmp.tokens", True),
    ("encode", "os.remove toy/.toy.slow.shards/0.npz", False),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_tiny_pair, tiny_config, taste_domain):
    """The folder of what the commands read, in which they write nothing."""
    folder = tmp_path_factory.mktemp("inputs")
    write_item_features(make_tiny_pair(folder, choosy=True))
    for model, keys in TRAINED.items():
        place = taste_domain.folder if "dataset" in keys else folder
        write_yaml(folder / f"{model}.yaml", tiny_config(model, data_path=place, save_per_user=True, **keys))
    keys = tiny_config("MF", data_path=folder, valid_metric="RMSE")
    keys.pop("model")
    write_yaml(folder / "compare.yaml", {
        "name": "small", "models": {"MF": {}, "CMF": {}}, "seeds": [1], "keys": keys,
        "tables": {"rating": {"metrics": ["rating.mae", "rating.rmse"]}},
        "tune": {"trials": 2, "seed": 1, "space": {"MF": {"learning_rate": [0.001, 0.01]}, "CMF": {}}}})
    write_raw_amazon(folder)
    write_raw_mmrec(folder)
    return folder


def write_yaml(path, content):
    path.write_text(yaml.safe_dump(content), encoding="utf-8")


def write_raw_amazon(folder):
    sys.path.append(str(ROOT / "tests" / "prep"))       # pytest adds it only where it collects from there.
    from amazon_files import dense_category, meta_line, review_line, write_lines, write_preset

    for name, seed in (("left", 1), ("right", 2)):
        ratings, items = dense_category(seed, range(40))
        write_lines(folder / f"{name}.json", [review_line("2018", rating) for rating in ratings])
        write_lines(folder / f"{name}.meta.json", [meta_line("2018", item) for item in items])
    write_preset(folder / "raw", PRESETS["music-task1"])


def write_raw_mmrec(folder):
    draw = np.random.default_rng(5)
    rows = [(user, item, 5, place, {0: 1, 1: 2}.get(place, 0)) for user in range(60)
            for place, item in enumerate(draw.permutation(30)[:9])]
    lines = [("userID", "itemID", "rating", "timestamp", "x_label"), *rows]
    (folder / "toy.inter").write_text("".join("\t".join(map(str, line)) + "\n" for line in lines))
    for name in ("image", "text"):
        np.save(folder / f"{name}_feat.npy", draw.normal(size=(30, 6)).astype(np.float32))


@pytest.fixture(scope="module")
def kinds(inputs):
    """Name -> kind of work."""

    def training(*words):
        return lambda root: [*words, "--output", str(root / "run")]

    def amazon(root):
        return ["prepare", "amazon", "--edition", "2018", "--output", str(root), "--reviews-text",
                "--common-users", "--reviews", *(str(inputs / f"{name}.json") for name in ("left", "right")),
                "--meta", *(str(inputs / f"{name}.meta.json") for name in ("left", "right")),
                "--name", "left", "right"]

    def with_items(root):
        """The folder of a data set, made before its features."""
        folder = root / "toy"
        if not folder.is_dir():
            folder.mkdir()
            rows = "".join(f"i{number}\tTitle {number}\n" for number in range(95))
            (folder / "toy.item").write_text("item_id:token\ttitle:token_seq\n" + rows)
            vectors = "".join(f"i{number}\t{number}.5 1 2\n" for number in range(95))
            (folder / "toy.sound").write_text("item_id:token\tsound:float_seq\n" + vectors)
            os.utime(folder / "toy.sound", (0, 0))    # What is made of it says how old it was.
        return str(folder)

    found = [Kind(model, training("--config", str(inputs / f"{model}.yaml")), True) for model in TRAINED]
    found += [
        Kind("default data", lambda root: [
            "--model=MF", "--dataset=ml100k-pair", "--epochs=2", "--state=WARNING", "--log_tensorboard=False",
            f"--data_path={root / 'dataset'}", "--output", str(root / "run")], True),
        Kind("amazon", amazon),
        Kind("preset", lambda root: ["prepare", "amazon", "--preset", "music-task1", "--raw",
                                     str(inputs / "raw"), "--output", str(root)]),
        Kind("mmrec", lambda root: ["prepare", "mmrec", "--folder", str(inputs), "--name", "toy", "--output",
                                    str(root), "--as", "new"]),
        Kind("encode", lambda root: ["prepare", "encode", "--data", with_items(root), "--encoder", "slow",
                                     "--fields", "title", "--shard-size", "10"]),
        Kind("features", lambda root: ["prepare", "features", "--data", with_items(root)]),
        Kind("compare", lambda root: ["compare", "--config", str(inputs / "compare.yaml"), "--no-plots",
                                      "--output", str(root / "store")])]
    return {kind.name: kind for kind in found}


@pytest.fixture(scope="module")
def whole_of(server, kinds, tmp_path_factory):
    """``whole_of(name)``: a kind of work done without a kill."""
    folder = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda name: whole_run(server, kinds[name], folder / name))


@pytest.mark.parametrize(("name", "place", "half"), PLACES)
def test_killed_at_a_place(name, place, half, server, kinds, whole_of, tmp_path):
    """In the middle of a file's writing (``half``), or right before a change."""
    tally, whole = Tally(name), whole_of(name)
    at = whole.places()[place][-1]
    outlive(server, kinds[name], whole, tmp_path / "case", [{"at": at, "half": half}], tally)
    assert tally.kills == 1 and not tally.lost and not tally.differing, tally.told()


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_two_hundred_kills(name, server, kinds, whole_of, tmp_path, capsys):
    """Half of them at any moment, half at every kind of place in turn."""
    tally, whole, draw = Tally(name), whole_of(name), random.Random(f"kills of {name}")
    places = draw.sample(list(whole.places()), len(whole.places()))
    number = 0
    while tally.kills < KILLS[name]:
        place = places[number // 2 % len(places)] if number % 2 else None
        deaths = random_deaths(whole, draw, place)
        outlive(server, kinds[name], whole, tmp_path / f"case{number}", deaths, tally)
        number += 1
    with capsys.disabled():
        print(f"\n{Tally.HEADER}\n{tally}")
    assert not tally.lost and not tally.differing, tally.told()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DiffCDR", "amazon", "preset", "mmrec", "encode", "features"])
def test_killed_at_every_place(name, server, kinds, whole_of, tmp_path, capsys):
    """Once before every kind of change, files that are written then cut in half."""
    tally, whole = Tally(name), whole_of(name)
    for number, changes in enumerate(whole.places().values()):
        deaths = [{"at": changes[len(changes) // 2], "half": True}]
        outlive(server, kinds[name], whole, tmp_path / f"case{number}", deaths, tally)
    with capsys.disabled():
        print(f"\n{Tally.HEADER}\n{tally}")
    assert not tally.lost and not tally.differing, tally.told()


@pytest.mark.slow
def test_a_comparison_whose_processes_outlive_it(server, kinds, tmp_path):
    """The parent alone is killed, and the same command given again at once."""
    kind = Kind("compare", lambda root: [*kinds["compare"].command(root), "--workers", "2"])
    whole, draw = whole_run(server, kind, tmp_path / "whole"), random.Random(1)
    root = tmp_path / "case"

    def start(timeout=None):
        words = [sys.executable, "-m", "recbole_mmdiff.cli", *kind.command(root)]
        return subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=timeout,
                              capture_output=True, text=True)

    started = time.monotonic()
    start()
    seconds = time.monotonic() - started
    shutil.rmtree(root)
    for _ in range(4):
        with contextlib.suppress(subprocess.TimeoutExpired):    # It kills, which is SIGKILL here.
            start(draw.uniform(0.3, 0.9) * seconds)
    last = start()
    assert last.returncode == 0, last.stderr
    assert not differences(whole.files, contents(root))
