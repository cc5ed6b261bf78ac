"""One run: its folder, its results, its repetition and its resumption."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from running import PRETRAINING, Killed, run_keys, saved_metrics, without_times

from recbole_mmdiff.errors import ConfigError, DataError
from recbole_mmdiff.evaluator import Evaluator
from recbole_mmdiff.quick_start import load_run, run
from recbole_mmdiff.storage import CheckpointError, load_plain, save_plain
from recbole_mmdiff.trainer import StagedTrainer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """A short run of MF with everything written."""
    keys = tiny_config("MF", save_per_user=True, state="INFO", seed=11)
    return run_keys(keys, tmp_path_factory.mktemp("quick") / "run")


@pytest.fixture
def copied(finished, tmp_path):
    """The folder of that run as if it had been killed at the end of the training."""
    folder = tmp_path / "copied"
    shutil.copytree(finished.folder, folder)
    (folder / "metrics.json").unlink()
    return folder


def test_run_folder(finished):
    assert sorted(path.name for path in finished.folder.iterdir()) \
        == ["checkpoint.pth", "config.yaml", "data", "metrics.json", "per_user.npz", "split.npz", "train.log"]
    config = yaml.safe_load((finished.folder / "config.yaml").read_text(encoding="utf-8"))
    assert config["model"] == "MF" and config["seed"] == 11 and config["epochs"] == 2
    log = (finished.folder / "train.log").read_text(encoding="utf-8")
    assert "ratings epoch 1: loss" in log and "test results:" in log
    assert "seed = 11   (config_dict)" in log


def test_metrics_file(finished):
    metrics = json.loads((finished.folder / "metrics.json").read_text(encoding="utf-8"))
    assert {"model", "dataset", "seed", "valid", "test", "groups", "seconds"} <= set(metrics)
    for part in ("valid", "test"):
        assert set(metrics[part]) == {"rating", "ranking_full", "ranking_labeled"}
        assert set(metrics[part]["rating"]) == {"mae", "rmse"}
        assert {f"{name}@{k}" for name in ("ndcg", "recall", "hit", "mrr", "precision")
                for k in (5, 10)} == set(metrics[part]["ranking_full"])
        assert {"ndcg@5", "random_ndcg@5", "ndcg@10", "random_ndcg@10"} \
            == set(metrics[part]["ranking_labeled"])
    assert set(metrics["groups"]) == {"cold_users", "warm_users", "cold_items", "warm_items",
                                      "linked_users", "unlinked_users"}
    assert metrics["seconds"]["training"] > 0 and metrics["seconds"]["evaluation"] > 0
    assert metrics == json.loads(json.dumps(finished.metrics))


def test_mean_over_users_is_the_metric(finished):
    with np.load(finished.folder / "per_user.npz", allow_pickle=False) as file:
        values = dict(file)
    for name in ("ranking_full", "ranking_labeled"):
        for metric, value in finished.metrics["test"][name].items():
            assert np.nanmean(values[f"{name}.{metric}"]) == pytest.approx(value, abs=1e-12)
    test = finished.parts.test
    users = test.inter_feat[test.uid_field].numpy()
    tokens, counts = np.unique(test.field2id_token[test.uid_field][users], return_counts=True)
    order = np.argsort(values["rating.user"])
    assert values["rating.user"][order].tolist() == tokens.astype(str).tolist()
    mae = np.average(values["rating.mae"][order], weights=counts)
    rmse = np.sqrt(np.average(values["rating.rmse"][order]**2, weights=counts))
    assert mae == pytest.approx(finished.metrics["test"]["rating"]["mae"], rel=1e-9)
    assert rmse == pytest.approx(finished.metrics["test"]["rating"]["rmse"], rel=1e-9)


def test_a_value_that_does_not_exist_is_null(tiny_config, tmp_path):
    bpr = run_keys(tiny_config("BPR"), tmp_path / "bpr")
    text = (bpr.folder / "metrics.json").read_text(encoding="utf-8")
    assert "NaN" not in text and json.loads(text)["test"]["rating"] is None


def test_nothing_is_written_outside_of_the_run_folder(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_keys(tiny_config("BPR", log_tensorboard=True), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_folder_of_a_run_is_not_used_again(finished, tiny_config):
    before = saved_metrics(finished.folder)
    with pytest.raises(ConfigError, match=r"--output: .*is not empty.*--resume"):
        run_keys(tiny_config("MF"), finished.folder)
    assert saved_metrics(finished.folder) == before


def test_an_empty_folder_is_used(tiny_config, tmp_path):
    assert run_keys(tiny_config("Bias"), tmp_path).folder == tmp_path


@pytest.mark.parametrize(("left", "free"), [
    (["train.log"], True), (["train.log", "split.npz"], True), (["train.log", "checkpoint.pth"], False),
    (["split.npz"], False), (["train.log", "mine.txt"], False)])
def test_a_run_begins_where_one_was_killed_before_its_configuration(left, free, tiny_config, tmp_path):
    for name in [*left, ".config.0123456789ab.tmp.yaml"]:
        (tmp_path / name).write_text("left")
    if free:
        assert saved_metrics(run_keys(tiny_config("Bias"), tmp_path).folder)
        assert not list(tmp_path.glob(".config.*"))
        return
    with pytest.raises(ConfigError, match="is not empty"):
        run_keys(tiny_config("Bias"), tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} \
        == dict.fromkeys([*left, ".config.0123456789ab.tmp.yaml"], "left")


def test_a_mistake_leaves_no_folder(tiny_config, tmp_path):
    with pytest.raises(DataError):
        run_keys(tiny_config("MF", test_user_ratio=0.001), tmp_path / "run")
    with pytest.raises(ConfigError):
        run_keys(tiny_config("MF", embeding_size=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_resumed(finished):
    with pytest.raises(ConfigError, match=r"--resume: .*is finished"):
        run(resume=finished.folder)


def test_a_folder_without_a_run_is_not_resumed(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no config\.yaml in .*holds no run"):
        run(resume=tmp_path)


def test_resumed_after_training(finished, copied):
    assert without_times(run(resume=copied).metrics) == without_times(finished.metrics)
    assert (copied / "per_user.npz").read_bytes()


def test_resumed_before_the_first_checkpoint(finished, copied):
    (copied / "checkpoint.pth").unlink()
    assert without_times(run(resume=copied).metrics) == without_times(finished.metrics)


def test_resumed_from_another_folder(finished, copied, tmp_path, monkeypatch):
    """Relative paths of the first call still hold."""
    monkeypatch.chdir(tmp_path)
    assert without_times(run(resume="copied").metrics) == without_times(finished.metrics)


@pytest.mark.parametrize("model", ["BPR", "MultiVAE", "NeuMF", "RecVAE"])
def test_a_model_of_recbole_resumes_too(model, tiny_config, tmp_path, monkeypatch):
    """They draw from the global streams, count steps, and RecVAE has two optimisers."""
    keys = tiny_config(model, epochs=4, embedding_size=8)
    whole = run_keys(keys, tmp_path / "whole")
    validate, done = StagedTrainer._validate, []

    def validate_and_die(trainer, stage, epoch):
        done.append(epoch)
        if len(done) == 3:
            raise Killed
        return validate(trainer, stage, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(StagedTrainer, "_validate", validate_and_die)
        with pytest.raises(Killed):
            run_keys(keys, tmp_path / "killed")
    torch.rand(3)
    np.random.rand(3)
    resumed = run(resume=tmp_path / "killed")
    assert without_times(resumed.metrics) == without_times(whole.metrics)
    (resumed.folder / "metrics.json").unlink()      # Killed once more, after the training.
    run(resume=resumed.folder)
    checkpoints = [load_plain(made.folder / "checkpoint.pth") for made in (whole, resumed)]
    assert checkpoints[0]["numbers"] == checkpoints[1]["numbers"] and "seed" in checkpoints[0]["numbers"]


class Hostile:
    """Unpickling it would run a command."""

    def __reduce__(self):
        return os.system, ("touch hostile_was_here",)


def test_checkpoints_that_cannot_be_resumed(copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = copied / "checkpoint.pth"
    good = path.read_bytes()
    path.write_bytes(good[:len(good) // 2])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth.*truncated"):
        run(resume=copied)
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match="pickled Python objects"):
        run(resume=copied)
    torch.save({"state_dict": Hostile()}, path)
    with pytest.raises(CheckpointError, match="pickled Python objects"):
        run(resume=copied)
    assert not (tmp_path / "hostile_was_here").exists()
    save_plain({"weights": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="is not a checkpoint of recbole_mmdiff"):
        run(resume=copied)
    path.write_bytes(good)
    run(resume=copied)


def test_a_checkpoint_of_another_model_or_size(finished, tiny_config, tmp_path):
    other = run_keys(tiny_config("CMF"), tmp_path / "cmf")
    with pytest.raises(CheckpointError, match=r"holds the model CMF.*says MF"):
        load_run(finished.folder, other.folder / "checkpoint.pth")
    wide = run_keys(tiny_config("MF", embedding_size=5), tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"do not fit MF.*size mismatch"):
        load_run(finished.folder, wide.folder / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        load_run(finished.folder, tmp_path / "nowhere.pth")


def test_load_run(finished):
    loaded = load_run(finished.folder)
    assert loaded.metrics == json.loads((finished.folder / "metrics.json").read_text(encoding="utf-8"))
    assert loaded.config["embedding_size"] == finished.config["embedding_size"]
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        load_run(finished.folder.parent)


@pytest.mark.parametrize("model", ["DiffCDR", "LightGCN"])
def test_hash_seed_changes_nothing(model, tiny_config, tmp_path):
    keys = tiny_config(model, **(PRETRAINING if model == "DiffCDR" else {}))
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump(keys), encoding="utf-8")
    started = []
    for seed in ("0", "1"):
        command = [sys.executable, "-m", "recbole_mmdiff.cli", "--config", str(file),
                   "--output", str(tmp_path / seed)]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert saved_metrics(tmp_path / "0") == saved_metrics(tmp_path / "1")
    with np.load(tmp_path / "0" / "split.npz") as first, np.load(tmp_path / "1" / "split.npz") as second:
        assert all(np.array_equal(first[name], second[name]) for name in first)


def test_throughput_counts_the_samples_of_the_last_stage(tiny_config, tmp_path):
    """EMCDR: overlapping users in its mapping stage, rated pairs in the test."""
    made = run_keys(tiny_config("EMCDR", **PRETRAINING), tmp_path / "run")
    mapping = [entry for entry in made.metrics["history"] if entry["stage"] == "mapping"]
    users = len(made.parts.train.overlap_users())
    assert [entry["samples"] for entry in mapping] == [users] * len(mapping)
    expected = users * len(mapping) / sum(entry["seconds"] for entry in mapping)
    assert made.metrics["throughput"]["training"] == pytest.approx(expected)
    assert made.metrics["throughput"]["evaluation"] > 0
    closed_form = run_keys(tiny_config("Bias"), tmp_path / "bias")
    assert closed_form.metrics["throughput"]["training"] is None


def test_a_run_without_test(tiny_config, tmp_path, monkeypatch):
    """A trial of tuning: the test data are never evaluated, and nothing of them is written."""
    keys = tiny_config("MF", save_per_user=True)
    whole = run_keys(keys, tmp_path / "whole")
    evaluate, phases = Evaluator.evaluate, []

    def note(self, model, phase, *args, **kwargs):
        phases.append(phase)
        return evaluate(self, model, phase, *args, **kwargs)

    monkeypatch.setattr(Evaluator, "evaluate", note)
    trial = run_keys(keys, tmp_path / "trial", test=False)
    assert set(phases) == {"valid"}
    assert trial.metrics["valid"] == whole.metrics["valid"]
    assert trial.metrics["test"] == trial.metrics["groups"] == {}
    assert not (trial.folder / "per_user.npz").exists()


def test_a_silent_run(tiny_config, tmp_path, capsys):
    keys = tiny_config("MF", state="INFO")
    run_keys(keys, tmp_path / "silent", console=False)
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""
    assert "test results" in (tmp_path / "silent" / "train.log").read_text()


def test_load_run_with_other_keys(finished):
    """Keys of the evaluation may change, those of the weights cannot."""
    assert load_run(finished.folder, overrides={"clip_ratings": True}).config["clip_ratings"]
    with pytest.raises(CheckpointError):
        load_run(finished.folder, overrides={"embedding_size": 3})


@pytest.fixture(scope="module")
def nobody_cold(tiny_pair, atomic, tmp_path_factory):
    """Keys of the pair with a split that holds out some rows of users of the target alone."""
    folder = tmp_path_factory.mktemp("nobody")
    atomic.write(folder, "src", tiny_pair.source_rows)
    labels = [1 + place % 2 if row[0] in tiny_pair.target_only and place % 3 else 0
              for place, row in enumerate(tiny_pair.target_rows)]
    atomic.write(folder, "tgt", [(*row, label) for row, label in zip(
        tiny_pair.target_rows, labels, strict=True)], [*atomic.header, "x_label:float"])
    columns = ["user_id", "item_id", "rating", "timestamp", "x_label"]
    return {"data_path": folder, "split_protocol": "benchmark", "load_col": {"inter": columns}}


@pytest.mark.parametrize(("model", "keys", "caution"), [
    ("EMCDR", PRETRAINING, "no test user of this split is cold: EMCDR transfers cold users only"),
    ("MMDCDR", {"modalities": [], "pretrain_epochs": 1, "diffusion_epochs": 1},
     "no test user of this split has a source row: MMDCDR transfers nobody")])
def test_a_model_that_transfers_nobody_says_so(nobody_cold, tiny_config, tmp_path, model, keys, caution):
    """And nothing where it transfers somebody: these logs hold warnings alone."""
    logs = []
    for name, more in (("somebody", {}), ("nobody", nobody_cold)):
        made = run_keys(tiny_config(model, **keys, **more), tmp_path / name)
        logs.append((made.folder / "train.log").read_text(encoding="utf-8").splitlines())
    assert not logs[0]
    assert len(logs[1]) == 1 and f"WARNING {caution}" in logs[1][0]


def test_a_model_without_transfer_has_no_cautions(nobody_cold, tiny_config, tmp_path):
    made = run_keys(tiny_config("MF", **nobody_cold), tmp_path / "run")
    assert made.model.cautions(torch.arange(3)) == []
    assert not (made.folder / "train.log").read_text(encoding="utf-8")
