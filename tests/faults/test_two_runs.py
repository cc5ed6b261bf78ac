"""Two processes in one folder: the second is told, and a killed one is in nobody's way."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from running import run_keys, saved_metrics

from dataset_prep.output import alone_with
from recbole_mmdiff.compare import cells
from recbole_mmdiff.errors import ConfigError, DataError, FolderInUse
from recbole_mmdiff.files import locked
from recbole_mmdiff.quick_start import run
from recbole_mmdiff.run_folder import LOCK, open_run_folder
from recbole_mmdiff.trainer import StagedTrainer

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from recbole_mmdiff.files import locked
with locked(Path(sys.argv[1]), ValueError()):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold():
    """``hold(path)``: a process of its own that holds the lock; it is killed in the end."""
    started = []

    def start(path):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_folder_in_use_is_refused_until_its_process_is_killed(tiny_config, tmp_path, hold):
    folder = tmp_path / "run"
    folder.mkdir()
    other = hold(folder / LOCK)
    with pytest.raises(FolderInUse, match=r"run: another run works in this folder; wait for it, or choose"):
        run_keys(tiny_config("MF"), folder)
    other.kill()
    other.wait()
    assert os.listdir(folder) == [LOCK]
    run_keys(tiny_config("MF", epochs=1), folder)
    assert not (folder / LOCK).exists()


def test_the_lock_of_a_killed_run_opens_its_folder_to_resume_alone(tiny_config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (LOCK, "config.yaml"):
        (folder / name).write_text("")
    with pytest.raises(ConfigError, match=r"run exists and is not empty; choose .*, or --resume="):
        run_keys(tiny_config("MF"), folder)
    assert (folder / "config.yaml").exists()


def test_a_run_under_way_is_not_gone_on_with(tiny_config, tmp_path, monkeypatch):
    """From inside of its training: neither anew nor by a second --resume."""
    save, refused = StagedTrainer._save, []

    def save_and_try(trainer, *arguments, **values):
        save(trainer, *arguments, **values)
        for way in ({"output": tmp_path / "run"}, {"resume": tmp_path / "run"}):
            with pytest.raises(FolderInUse) as error:
                run(config_dict=tiny_config("MF"), **way)
            refused.append(str(error.value))

    monkeypatch.setattr(StagedTrainer, "_save", save_and_try)
    made = run_keys(tiny_config("MF"), tmp_path / "run")
    assert len(refused) >= 4 and made.metrics["test"]
    monkeypatch.undo()
    assert saved_metrics(made.folder) == saved_metrics(run_keys(tiny_config("MF"), tmp_path / "whole").folder)


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    class Moment:
        @staticmethod
        def now():
            from datetime import datetime

            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("recbole_mmdiff.run_folder.datetime", Moment)

    def begin(_):
        with open_run_folder({"model": "MF", "dataset": "a-b"}, None, None) as folder:
            (folder / "config.yaml").write_text("")
            return str(folder)

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(begin, range(8)))
    first = str(Path("runs") / "MF-a-b-20260102-030405")
    assert found == {first, *(f"{first}-{number}" for number in range(2, 9))}


def test_a_cell_that_somebody_resumes_by_hand_is_left_alone(tiny_config, tmp_path, monkeypatch):
    keys, folder = tiny_config("MF", show_progress=False), tmp_path / "cell"
    job = {"files": [], "overrides": {}}

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StagedTrainer, "_validate", killed)
        with pytest.raises(KeyboardInterrupt):
            cells._run_or_resume(job, keys, folder)
    before = {path.name for path in folder.iterdir()}
    with locked(folder / LOCK, ValueError()):
        with pytest.raises(FolderInUse):
            cells._run_or_resume(job, keys, folder)
        assert {path.name for path in folder.iterdir()} == before | {LOCK}
    assert cells._run_or_resume(job, keys, folder).metrics["test"]


def test_two_preparations_of_one_data_set(tmp_path):
    with alone_with(tmp_path / "out" / "books"):
        with pytest.raises(DataError, match="books: another process prepares this data set; wait for it"), \
                alone_with(tmp_path / "out" / "books"):
            pass
        with alone_with(tmp_path / "out" / "films"):
            pass
    with alone_with(tmp_path / "out" / "books"):
        pass
