"""A disk without room: what is told, what is left, and how a run goes on."""

import errno
import os
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from injecting import file_limit, leftovers
from running import run_keys, saved_metrics

from dataset_prep import ml100k
from recbole_mmdiff import cli
from recbole_mmdiff.errors import DataError, WriteError
from recbole_mmdiff.files import write_atomically, write_json
from recbole_mmdiff.quick_start import run
from recbole_mmdiff.run_log import RunLog
from recbole_mmdiff.storage import load_plain, save_plain
from recbole_mmdiff.trainer import StagedTrainer


def write_arrays(path):
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, values=np.arange(9999))


def write_frame(path):
    with write_atomically(path) as temporary:
        pd.DataFrame({"value": np.arange(9999)}).to_csv(temporary)


def write_parquet(path):
    polars = pytest.importorskip("polars")
    with write_atomically(path) as temporary:
        polars.DataFrame({"value": np.random.default_rng(1).random(9999)}).write_parquet(temporary)


WRITERS = {"torch": lambda path: save_plain({"weights": torch.rand(9999)}, path), "numpy": write_arrays,
           "json": lambda path: write_json(list(range(9999)), path), "pandas": write_frame,
           "polars": write_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_cannot_grow_is_named_and_the_old_one_stays(tmp_path, kind):
    path = tmp_path / "file"
    path.write_text("old")
    with file_limit(5000), pytest.raises(WriteError) as error:
        WRITERS[kind](path)
    assert str(error.value).startswith(f"{path}: cannot be written (File too large, ")
    assert " MB are free); make room on this disk, or use another one" in str(error.value)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_only_what_concerns_the_file_is_told_of_it(tmp_path):
    """A file that is copied from and is gone, and a mistake without any file."""
    for raised in (FileNotFoundError(errno.ENOENT, "gone", str(tmp_path / "other")), ValueError("no disk")):
        with pytest.raises(type(raised)) as error, write_atomically(tmp_path / "file"):
            raise raised
        assert error.value is raised


def test_a_checkpoint_without_room_leaves_the_last_one_to_go_on_from(tiny_config, tmp_path, monkeypatch):
    keys = tiny_config("MF", epochs=4, keep_data=False)
    whole = run_keys(keys, tmp_path / "whole")
    save, done = StagedTrainer._save, []

    def save_on_a_full_disk(trainer, *arguments, **values):
        done.append(1)
        if len(done) < 3:
            return save(trainer, *arguments, **values)
        with file_limit(3000):
            return save(trainer, *arguments, **values)

    with monkeypatch.context() as patch:
        patch.setattr(StagedTrainer, "_save", save_on_a_full_disk)
        with pytest.raises(WriteError) as error:
            run_keys(keys, tmp_path / "run")
    folder = tmp_path / "run"
    assert f"{folder / 'checkpoint.pth'}: cannot be written" in str(error.value)
    assert str(error.value).endswith(f"--resume={folder} goes on from its last checkpoint, which is whole")
    assert load_plain(folder / "checkpoint.pth")["progress"]["epoch"] == 2
    assert not leftovers(folder) and "WriteError" in (folder / "train.log").read_text()
    run(resume=folder)
    assert saved_metrics(folder) == saved_metrics(whole.folder)


@pytest.mark.parametrize(("name", "limit"), [("split.npz", 10), ("config.yaml", 9000)])
def test_no_room_at_the_start_leaves_nothing(tiny_config, tmp_path, monkeypatch, name, limit):
    monkeypatch.chdir(tmp_path)
    keys = tiny_config("MF", topk=list(range(1, 5000)))     # A long line of config.yaml.
    with file_limit(limit), pytest.raises(WriteError, match=name) as error:
        run(config_dict=keys)
    assert "--resume" not in str(error.value) and not os.listdir(tmp_path)


def test_data_without_room_are_not_kept_half(tiny_config, tmp_path):
    folder = tmp_path / "run"
    with file_limit(4000), pytest.raises(WriteError, match=r"inter: cannot .*keep_data: False") as error:
        run(config_dict=tiny_config("MF", save_per_user=False), output=folder)
    assert str(error.value).endswith(f"--resume={folder} starts it again") and not (folder / "data").exists()
    assert run(resume=folder, overrides={"keep_data": False}).metrics["test"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_log_without_room_does_not_end_the_run(tiny_config, tmp_path, capsys, monkeypatch):
    """The log of the resumed run is the device that is always full."""
    whole = run_keys(tiny_config("MF"), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(StagedTrainer, "_validate", lambda *arguments: sys.exit())
        with pytest.raises(SystemExit):
            run_keys(tiny_config("MF"), tmp_path / "run")
    log = tmp_path / "run" / "train.log"
    log.unlink()
    log.symlink_to("/dev/full")
    capsys.readouterr()
    run(resume=tmp_path / "run", overrides={"state": "INFO"}, console=False)
    told = capsys.readouterr().err
    assert told == f"{log}: the log cannot be written (No space left on device); the run goes on without it\n"
    assert saved_metrics(tmp_path / "run") == saved_metrics(whole.folder)


def test_other_mistakes_of_a_log_are_shown(tmp_path, capsys):
    log = RunLog(tmp_path, tensorboard=False)
    log.handle(log_record("%d", "no number"))
    log.close()
    assert "TypeError" in capsys.readouterr().err


def log_record(message, *values):
    import logging

    return logging.LogRecord("root", logging.INFO, "file", 1, message, values, None)


def test_tensorboard_without_room_is_one_line_with_the_way_on(tiny_config, tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with pytest.raises(WriteError, match=r"run: cannot be written \(No space .*--resume=.*starts it again"):
        run_keys(tiny_config("MF", log_tensorboard=True), tmp_path / "run")


def test_an_error_of_another_kind_stays_what_it_is(tiny_config, tmp_path, monkeypatch):
    def refused(*_):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens")

    monkeypatch.setattr(StagedTrainer, "_validate", refused)
    with pytest.raises(ConnectionRefusedError):
        run_keys(tiny_config("MF"), tmp_path / "run")


def test_the_command_line_tells_it_in_one_line(monkeypatch, capsys):
    def full(**_):
        raise WriteError("RUN: cannot be written")

    monkeypatch.setattr("recbole_mmdiff.quick_start.run", full)
    assert cli.main(["--model=MF"]) == 2
    assert capsys.readouterr().err == "error: RUN: cannot be written\n"


def test_default_data_without_room_leave_nothing(tmp_path):
    with file_limit(20_000), pytest.raises(WriteError, match=r"data: cannot be written .*make room"):
        ml100k.ensure(tmp_path / "data")
    assert {path.name for path in (tmp_path / "data").rglob("*")} <= {".prepare", "ml100k.lock"}


def test_a_preparation_names_the_file(monkeypatch, tmp_path):
    from dataset_prep import cli as prepare

    monkeypatch.setattr(prepare, "_run", lambda name, words: WRITERS["json"](tmp_path / "file"))
    with file_limit(5000), pytest.raises(DataError, match=r"^prepare mmrec: .*file: cannot be .*room"):
        prepare.main(["mmrec"])
