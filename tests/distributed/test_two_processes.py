"""Two processes over gloo against one: the same losses, weights and metrics."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import several
import torch
import yaml
from running import CROSS_MODELS, FINETUNED_MODELS, RANKING_MODELS, SINGLE, Killed, write_item_features

from recbole_mmdiff import cli, distributed
from recbole_mmdiff.config import Config, processes
from recbole_mmdiff.config.processes import environment
from recbole_mmdiff.errors import ConfigError, ProcessError
from recbole_mmdiff.launching import _cause, run_processes
from recbole_mmdiff.quick_start import run
from recbole_mmdiff.run_log import log_to
from recbole_mmdiff.storage import load_plain
from recbole_mmdiff.trainer import StagedTrainer
from recbole_mmdiff.trainer.checkpoint import random_state, set_random_state

ROOT = Path(__file__).resolve().parents[2]
#: the systems of the papers, each with all of its stages
SYSTEMS = {
    "DiffCDR": {"pretrain_epochs": 1, "pretrain_batch_size": 256, "train_batch_size": 64},
    "MuSiC": {"modalities": ["text"], "pretrain_epochs": 1, "pretrain_batch_size": 256, "feature_epochs": 1,
              "side_epochs": 1, "num_steps": 4, "train_batch_size": 16},
    "MMDCDR": {"modalities": ["text", "image"], "pretrain_epochs": 1, "pretrain_batch_size": 256,
               "diffusion_epochs": 1, "train_batch_size": 16},
    "SIEOUG": {"modalities": ["text", "image"], "embedding_size": 8, "num_clusters": 3, "knn_k": 4,
               "train_batch_size": 64, "split_protocol": "ratio", "eval_passes": ["ranking_full"]},
    "CCDRec": {"train_batch_size": 64, "embedding_size": 8, "knn_k": 5, "num_steps": 6,
               "curriculum_interval": 1, "epochs": 2},
}
#: of RecBole; the last has batch norms, which see the rows of their process
RECBOLES = ("BPR", "LightGCN", "NFM")
MEASURES = {"metrics": ["NDCG", "GAUC"], "epochs": 1}


def two(function, **arguments):
    run_processes(function, arguments, 2, environment({"port": None, "ip": "localhost", "world_size": 2,
                                                       "nproc": 2}))


@pytest.fixture(scope="module")
def pair_with_features(tiny_pair, make_tiny_pair, tmp_path_factory):
    pair = make_tiny_pair(tmp_path_factory.mktemp("featured"))
    write_item_features(pair, without={})
    return pair.folder


@pytest.fixture(scope="module")
def settings(tiny_config, ranking_config, pair_with_features):
    def keys_of(model):
        if model == "CCDRec":
            return ranking_config(model, **SYSTEMS[model])
        return tiny_config(model, data_path=pair_with_features, **{**MEASURES, **SYSTEMS[model]})

    return {model: keys_of(model) for model in SYSTEMS} | {
        model: tiny_config(model, **MEASURES) for model in RECBOLES}


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    """name -> what one process found, and what each of two."""
    alone, both = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("both")
    several.runs(settings, str(alone))
    two(several.runs, settings=settings, folder=str(both))
    return {name: (load_plain(alone / f"{name}-0.pth"),
                   [load_plain(both / f"{name}-{rank}.pth") for rank in (0, 1)], alone / name, both / name)
            for name in settings}


@pytest.mark.parametrize("model", SYSTEMS)
def test_the_systems_learn_what_one_process_learns(trained, model):
    one, (first, second), *_ = trained[model]
    assert len(one["losses"]) >= 5
    assert not one["shared"]
    assert len(first["shared"]) > 5
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-4, abs=1e-4)
    for name, value in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-4, msg=name)
        assert torch.equal(first["weights"][name], second["weights"][name]), name


@pytest.mark.parametrize("model", SYSTEMS)
def test_the_systems_are_evaluated_alike(trained, model):
    one, both, *_ = trained[model]
    for measured in both:
        assert measured["metrics"].keys() == one["metrics"].keys()
        for name, values in one["metrics"].items():
            assert measured["metrics"][name] == (values and pytest.approx(values, abs=1e-4)), name


@pytest.mark.parametrize("model", RECBOLES)
def test_recboles_models_share_their_batches(trained, model):
    """Both processes have the same weights, which are near those of one that drew other negatives."""
    one, (first, second), *_ = trained[model]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    assert first["history"][0]["loss"] == second["history"][0]["loss"]
    assert first["history"][0]["loss"] == pytest.approx(one["history"][0]["loss"], rel=0.02)


@pytest.mark.slow
def test_every_model_of_ours(tiny_config, ranking_config, pair_with_features, tmp_path):
    """With a warm start, so that fine-tuning is among the stages."""
    settings = {model: ranking_config(model, epochs=1) for model in RANKING_MODELS}
    for model in CROSS_MODELS:
        keys = {"train_neg_ratio": 1} if model in ("CoNet", "BiTGCF", "DisenCDR") else {}
        split = {"split_protocol": "warm_start"} if model in FINETUNED_MODELS else {}
        settings[model] = tiny_config(model, data_path=pair_with_features, **{**MEASURES, **keys, **split})
    several.runs(settings, str(tmp_path / "alone"))
    two(several.runs, settings=settings, folder=str(tmp_path / "both"))
    for model in settings:
        one, first, second = (load_plain(tmp_path / name) for name in (
            f"alone/{model}-0.pth", f"both/{model}-0.pth", f"both/{model}-1.pth"))
        assert first["losses"] == pytest.approx(one["losses"], rel=1e-3, abs=1e-4), model
        assert all(torch.equal(value, second["weights"][name])
                   for name, value in first["weights"].items()), model
        for name, values in one["metrics"].items():
            assert first["metrics"][name] == (values and pytest.approx(values, abs=1e-3)), (model, name)


@pytest.mark.slow
def test_models_of_recbole_of_every_kind(tiny_config, tmp_path):
    """Both processes end with the same weights and the same metrics."""
    general = ["ItemKNN", "EASE", "MultiVAE", "NeuMF", "NGCF", "DMF", "SGL", "SimpleX", "Pop", "DiffRec"]
    settings = {model: tiny_config(model, **MEASURES) for model in (*general, "FM", "DeepFM")}
    sequences = {**SINGLE, "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO"}, "epochs": 1,
                 "MAX_ITEM_LIST_LENGTH": 8}
    settings["SASRec"] = tiny_config("SASRec", **sequences, train_neg_sample_args=None, loss_type="CE")
    settings["FPMC"] = tiny_config("FPMC", **sequences)
    two(several.runs, settings=settings, folder=str(tmp_path))
    for model in settings:
        first, second = (load_plain(tmp_path / f"{model}-{rank}.pth") for rank in (0, 1))
        assert all(torch.equal(value, second["weights"][name])
                   for name, value in first["weights"].items()), model
        assert first["metrics"] == second["metrics"], model


def test_the_first_process_alone_writes(trained):
    for name, (*_, alone, both) in trained.items():
        files = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (alone, both)]
        assert files[0] == files[1], name
        lines = [(folder / "train.log").read_text(encoding="utf-8").splitlines() for folder in (alone, both)]
        assert len(lines[0]) == len(lines[1]), name


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    two(several.pieces, folder=str(folder))
    return [load_plain(folder / f"pieces-{rank}.pth") for rank in (0, 1)]


@pytest.mark.parametrize(("name", "count"), [("odd", 7), ("one", 1)])
def test_gradients_of_rows_computed_by_parts(pieces, name, count):
    model = several.network()
    several.loss_of(model, torch.arange(count)).backward()
    for found in pieces:
        for key, value in model.named_parameters():
            if value.grad is None:
                assert found[name][key] is None
            else:
                torch.testing.assert_close(found[name][key], value.grad)


def test_rows_come_back_in_their_order_and_type(pieces):
    for found in pieces:
        for dtype in (torch.bool, torch.bfloat16, torch.int64, torch.float64):
            assert torch.equal(found[str(dtype)], (torch.arange(10).view(5, 2) % 3).to(dtype))


def test_gradients_are_averaged(pieces):
    for found in pieces:
        assert [value.tolist() for value in found["average"]] == \
            [[0.5, 0.5], [2.0, 2.0], [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]]


def test_what_the_first_has_all_have(pieces):
    first, second = pieces
    assert all(torch.equal(value, second["same"][name]) for name, value in first["same"].items())
    assert first["text"] == second["text"] == "földer 0"
    assert (first["was there"], second["was there"]) == (False, True)


def test_nproc_goes_on_where_one_process_was(tiny_config, tmp_path, monkeypatch):
    keys = tiny_config("DiffCDR", **SYSTEMS["DiffCDR"])
    whole = run(config_dict=keys, output=tmp_path / "whole", console=False)
    save = StagedTrainer._save

    def save_and_die(trainer, *args, **keywords):
        save(trainer, *args, **keywords)
        if trainer.progress.stage == 2:
            raise Killed

    monkeypatch.setattr(StagedTrainer, "_save", save_and_die)
    with pytest.raises(Killed):
        run(config_dict=keys, output=tmp_path / "begun", console=False)
    ended = run(resume=tmp_path / "begun", overrides={"nproc": 2}, console=False)
    assert [entry["loss"] for entry in ended.metrics["history"]] \
        == [pytest.approx(entry["loss"], rel=1e-4) for entry in whole.metrics["history"]]
    assert ended.metrics["test"]["rating"] == pytest.approx(whole.metrics["test"]["rating"], abs=1e-4)


@pytest.mark.slow
def test_torchrun(tiny_config, tmp_path):
    """The command line under a launcher, with what each process says."""
    keys = tiny_config("DiffCDR", **SYSTEMS["DiffCDR"])
    config = tmp_path / "keys.yaml"
    config.write_text(yaml.safe_dump(keys), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "run_recbole_mmdiff.py"), "--config", str(config)]
    done = subprocess.run([*command, f"--output={tmp_path / 'run'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: ") == 1
    alone = run(config_dict=keys, output=tmp_path / "alone", console=False)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert found["test"]["rating"] == pytest.approx(alone.metrics["test"]["rating"], abs=1e-4)
    refused = subprocess.run([*command, f"--output={tmp_path / 'run'}"], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "error of process 0: --output: " in refused.stderr


def test_a_dead_process_ends_the_others_who_say_so(tmp_path):
    with pytest.raises(ProcessError, match=r"process 1 of the run was ended by SIGKILL .*--resume=FOLDER"):
        two(several.lose_one, folder=str(tmp_path))


def test_what_one_process_fails_with_is_shown():
    """Though the other, which lost it, may end first."""
    with pytest.raises(RuntimeError, match=r"in process 1:\nTraceback(.*\n)+KeyError: 'nobody expected'"):
        two(several.fail_in_one)


@pytest.mark.parametrize(("said", "codes", "told"), [
    ([(ProcessError, "lost"), (ConfigError, "mistake")], (2, 2), (ConfigError, "mistake")),
    ([(ProcessError, "lost")], (2, -9), (ProcessError, "process 5 of the run was ended by SIGKILL")),
    ([(ProcessError, "lost")], (2, -15), (ProcessError, "lost")),
    ([], (-15, 0), (ProcessError, "process 4 of the run was ended by SIGTERM")),
    ([(RuntimeError, "bug"), (ConfigError, "mistake")], (1, 2), (ConfigError, "mistake")),
])
def test_the_cause_is_told_whichever_process_ends_first(said, codes, told):
    said = list(said)
    queue = SimpleNamespace(empty=lambda: not said, get=lambda: said.pop(0))
    cause = _cause(queue, codes, offset=4)
    assert type(cause) is told[0]
    assert str(cause).startswith(told[1])


def test_who_waits_for_a_dead_process_says_so(tmp_path, monkeypatch):
    """As under a launcher that does not end the others itself."""
    def broken(*_, **__):
        raise RuntimeError("Connection closed by peer\nmore")

    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "all_gather", broken)
    with pytest.raises(ProcessError, match=r"process 0 of 2: another process has ended.*closed by peer\)"):
        distributed.gathered(torch.zeros(1), 2)


def test_a_mistake_is_told_once(tiny_config, tmp_path):
    keys = tiny_config("BPR", nproc=2, data_path=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere"):
        run(config_dict=keys, output=tmp_path / "run", console=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("keys", "message"), [
    ({"nproc": 0}, "nproc: 0 is too small"),
    ({"world_size": 4, "nproc": 2}, "port: on several machines"),
    ({"world_size": 2, "nproc": 2, "group_offset": 1}, "world_size: 2 is less than the 2 processes"),
])
def test_keys_that_do_not_fit(tiny_config, keys, message):
    with pytest.raises(ConfigError, match=message):
        Config(config_dict=tiny_config("BPR", **keys))


@pytest.mark.parametrize(("chosen", "there", "rank", "gpu"), [
    (None, 0, 1, ""), (None, 4, 3, "3"), ("5,7", 8, 1, "7"), ("", 4, 1, "")])
def test_each_process_has_a_gpu(tiny_config, monkeypatch, chosen, there, rank, gpu):
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    keys = {"use_gpu": True} if chosen is None else {"use_gpu": True, "gpu_id": chosen}
    assert Config(config_dict=tiny_config("BPR", **keys))["gpu_id"] == gpu


def test_the_gpus_that_were_given_are_dealt_out(tiny_config, monkeypatch):
    """A scheduler names them; an earlier configuration of the process has put one in their place."""
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    monkeypatch.setattr(processes, "_GIVEN", "4,5")
    monkeypatch.setattr(torch.cuda, "device_count",
                        lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    for _ in range(2):
        assert Config(config_dict=tiny_config("BPR", use_gpu=True))["gpu_id"] == "5"


def test_nproc_leaves_the_gpus_to_its_processes(tiny_config, monkeypatch):
    """One that was chosen by default here would be all that they see."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(processes, "_GIVEN", None)
    Config(config_dict=tiny_config("BPR", nproc=2, use_gpu=True))
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_machine_with_fewer_gpus_goes_on(monkeypatch):
    states, found = torch.arange(6, dtype=torch.uint8).view(3, 2), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", found.extend)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states))
    set_random_state(random_state())
    assert [state.tolist() for state in found] == [[0, 1]]


@pytest.mark.parametrize("keys", [{}, {"gpu_id": 1}])
def test_a_gpu_that_nobody_chose_is_not_saved(tiny_config, tmp_path, keys):
    """Else all processes of a resumed run would have to share it."""
    config = Config(config_dict=tiny_config("BPR", **keys))
    config.save(tmp_path / "config.yaml")
    again = Config(config_file_list=[tmp_path / "config.yaml"])
    assert again.plain_run_dict().get("gpu_id") == keys.get("gpu_id")
    assert ("gpu_id" in again.origin) == bool(keys)


def test_more_processes_than_gpus(tiny_config, monkeypatch):
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"gpu_id: 2 processes on this machine have 1 GPUs"):
        Config(config_dict=tiny_config("BPR", use_gpu=True))


def test_all_stop_by_the_first_ones_score(tiny_config, tmp_path, monkeypatch):
    """Machines may differ in the last digit, and one that stops alone leaves the others waiting."""
    monkeypatch.setattr(distributed, "from_first", lambda text: text if os.sep in text else "7.5")
    made = run(config_dict=tiny_config("MF", epochs=1), output=tmp_path / "run", console=False)
    assert made.metrics["history"][-1]["valid_score"] == 7.5


def test_the_first_alone_shows_progress(tiny_config, tmp_path, monkeypatch):
    shown, fit = [], StagedTrainer.fit

    def fit_as_both(trainer, *args, **keywords):
        for first in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(distributed, "is_first", lambda first=first: first)
                fit(trainer, *args, **keywords)
            shown.append(trainer.show_progress)

    monkeypatch.setattr(StagedTrainer, "fit", fit_as_both)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(config_dict=tiny_config("MF", epochs=1, show_progress=True), output=tmp_path / "run", console=False)
    assert shown == [False, True]


def test_a_launcher_that_gives_no_number(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["run", "--model=Nonesuch"]) == 2
    assert "error of process ?: model: there is no model 'Nonesuch'" in capsys.readouterr().err


def test_what_holds_for_one_process_alone_is_told_by_it(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    config = Config(config_dict=tiny_config("BPR"))
    handlers = log_to(tmp_path, config, console=True)
    try:
        logging.getLogger().warning("of all")
        logging.getLogger().warning("of one", extra=distributed.EACH)
    finally:
        for handler in handlers:
            logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err == "process 1: of one\n"
    assert not list(tmp_path.iterdir())
