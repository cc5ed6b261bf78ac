"""Running a comparison: alone or side by side, killed and continued, with cells that fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import saved_metrics

from recbole_mmdiff.cli import main
from recbole_mmdiff.compare import compare
from recbole_mmdiff.compare.workers import DIED, _Slot, in_processes
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.quick_start import run


def cells_of(store) -> dict[tuple, Path]:
    plan = json.loads((Path(store) / "plan.json").read_text())
    return {(cell["table"], cell["setting"], cell["model"], cell["seed"]): Path(store) / cell["folder"]
            for cell in plan["cells"]}


def assert_same_results(first, second):
    ours, theirs = cells_of(first), cells_of(second)
    assert list(ours) == list(theirs)
    for key, folder in ours.items():
        assert saved_metrics(folder) == saved_metrics(theirs[key]), key
        with np.load(folder / "per_user.npz") as one, np.load(theirs[key] / "per_user.npz") as other:
            assert sorted(one) == sorted(other)
            assert all(np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f")
                       for name in one)


def test_side_by_side_gives_the_numbers_of_alone(write_comparison, tmp_path):
    path = write_comparison(models={"MF": {}, "DiffCDR": {"pretrain_epochs": 2}})
    alone = compare(path, tmp_path / "alone", workers=1)
    together = compare(path, tmp_path / "together", workers=4)
    assert_same_results(alone, together)
    # And those of a run by itself, outside of any comparison.
    folder = cells_of(alone)["rating", "default", "DiffCDR", 2]
    by_itself = run(config_files=[folder / "config.yaml"], output=tmp_path / "run")
    assert saved_metrics(by_itself.folder) == saved_metrics(folder)


def test_a_finished_cell_is_never_run_again(write_comparison, tmp_path, inline):
    path = write_comparison()
    store = compare(path, tmp_path / "store", workers=2)
    before = {folder: (folder / "metrics.json").stat().st_mtime_ns for folder in cells_of(store).values()}
    compare(path, store, workers=2)
    # Another seed and another setting are other cells; those that are there stay.
    path = write_comparison(seeds=[1, 2, 3])
    compare(path, store)
    assert len(cells_of(store)) == 6
    assert {folder: (folder / "metrics.json").stat().st_mtime_ns for folder in before} == before


def test_changed_keys_or_data_make_another_cell(write_comparison, make_tiny_pair, tmp_path, inline):
    pair = make_tiny_pair(tmp_path / "data")
    keys = {"data_path": str(pair.folder)}
    store = compare(write_comparison(seeds=[1], models={"MF": {}}, keys=keys), tmp_path / "store")
    (first,) = cells_of(store).values()
    compare(write_comparison(seeds=[1], models={"MF": {"reg_weight": 0.5}}, keys=keys), store)
    (second,) = cells_of(store).values()
    file = pair.folder / "tgt" / "tgt.inter"
    file.write_text(file.read_text().replace("\t1\t", "\t2\t"))
    compare(write_comparison(seeds=[1], models={"MF": {}}, keys=keys), store)
    (third,) = cells_of(store).values()
    assert len({first, second, third}) == 3
    # Where a run reads and how loudly it tells is no matter of its numbers.
    compare(write_comparison(seeds=[1], models={"MF": {}}, keys={**keys, "state": "WARNING"}), store)
    assert list(cells_of(store).values()) == [third]


def test_killed_in_the_middle_and_continued(write_comparison, tmp_path):
    """The whole group of processes is killed with SIGKILL once some cells are there."""
    path = write_comparison(models={"MF": {"epochs": 60, "stopping_step": 60},
                                    "EMCDR": {"pretrain_epochs": 30, "epochs": 30}}, seeds=[1, 2, 3])
    whole = compare(path, tmp_path / "whole", workers=2)
    store, code = tmp_path / "killed", "import sys; from recbole_mmdiff.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "compare", "--config", str(path), "--output", str(store),
               "--workers=2", "--no-plots"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(store.glob("cells/*/cell.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = len(list(store.glob("cells/*/cell.json")))
    assert 2 <= finished < 6
    before = {path: path.stat().st_mtime_ns for path in store.glob("cells/*/cell.json")}
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"6 cells, {6 - finished} to run" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_same_results(whole, store)


def test_a_cell_that_fails_stops_no_other_and_is_tried_again(write_comparison, tmp_path, inline):
    path = write_comparison(models={"MF": {}, "wild": {"model": "MF", "learning_rate": 1e30}}, seeds=[1])
    store = compare(path, tmp_path / "store")
    cells = cells_of(store)
    assert (cells["rating", "default", "MF", 1] / "metrics.json").is_file()
    wild = cells["rating", "default", "wild", 1]
    error = json.loads((wild / "error.json").read_text())
    assert "training loss" in error["error"] and "Traceback" in error["traceback"]
    assert not (wild / "metrics.json").exists()
    before = (wild / "error.json").stat().st_mtime_ns
    compare(path, store)
    assert (wild / "error.json").stat().st_mtime_ns > before


def test_one_comparison_at_a_time_in_a_store(write_comparison, tmp_path):
    from filelock import FileLock

    (tmp_path / "store").mkdir()
    with FileLock(tmp_path / "store" / ".lock"), pytest.raises(ConfigError, match="another compare"):
        compare(write_comparison(), tmp_path / "store")


def one_job(job):
    """A job for the workers below."""
    if job["what"] == "die":
        os._exit(9)
    return {"number": job["number"], "gpu": job.get("gpu_id")}


def test_a_dead_process_takes_no_other_job_with_it():
    jobs = [{"what": "die" if number == 2 else "live", "number": number} for number in range(6)]
    answers = list(in_processes(one_job, jobs, workers=2, gpus=2))
    assert sorted(job["number"] for job, _ in answers) == list(range(6))
    for job, answer in answers:
        if job["what"] == "die":
            assert "ended without an answer" in answer["error"]
        else:
            assert answer["number"] == job["number"] and answer["gpu"] in ("0", "1")


def test_no_jobs_no_processes():
    assert list(in_processes(one_job, [], workers=2)) == []


@pytest.mark.slow
def test_on_ray(write_comparison, tmp_path):
    pytest.importorskip("ray", reason="Ray cannot be imported here", exc_type=ImportError)
    path = write_comparison(seeds=[1])
    assert_same_results(compare(path, tmp_path / "ray", executor="ray"), compare(path, tmp_path / "one"))


def test_unknown_executor(write_comparison, tmp_path):
    with pytest.raises(ConfigError, match=r"executor: 'rya'.*did you mean 'ray'"):
        compare(write_comparison(), tmp_path / "store", executor="rya")


def test_labels_and_other_files_run_nothing_again(write_comparison, make_tiny_pair, tmp_path, inline):
    """A cell is what is run: not what it is called, nor what else lies beside the data."""
    pair = make_tiny_pair(tmp_path / "data")
    keys = {"data_path": str(pair.folder)}
    store = compare(write_comparison(models={"MF": {}}, keys=keys), tmp_path / "store")
    (pair.folder / "tgt" / "notes.txt").write_text("not data")
    path = write_comparison(models={"mine/ours, a long " + "x" * 300: {"model": "MF"}}, keys=keys,
                            sweeps=[{"model": "mine/ours, a long " + "x" * 300, "key": "embedding_size",
                                     "values": [16, 4]}])
    compare(path, store)
    # The swept default is the model itself.
    assert len(cells_of(store)) == 6 and len(list(store.glob("cells/*"))) == 4


def test_a_killed_cell_goes_on_with_the_data_of_its_name(write_comparison, make_tiny_pair, tmp_path, inline,
                                                         monkeypatch):
    """The data moved, and what lies at the old place is something else now."""
    from running import Killed

    from recbole_mmdiff.trainer import StagedTrainer

    old, new = make_tiny_pair(tmp_path / "old"), make_tiny_pair(tmp_path / "new")
    save = StagedTrainer._save

    def save_and_die(trainer, loader=None, finished=False):
        save(trainer, loader, finished)
        raise Killed

    models = {"MF": {"epochs": 3}}
    monkeypatch.setattr(StagedTrainer, "_save", save_and_die)
    path = write_comparison(models=models, seeds=[1], keys={"data_path": str(old.folder)})
    store = compare(path, tmp_path / "store")
    (folder,) = cells_of(store).values()
    assert (folder / "checkpoint.pth").is_file() and not (folder / "metrics.json").exists()
    monkeypatch.setattr(StagedTrainer, "_save", save)
    file = old.folder / "tgt" / "tgt.inter"
    file.write_text(file.read_text().replace("\t1\t", "\t5\t"))
    path = write_comparison(models=models, seeds=[1], keys={"data_path": str(new.folder)})
    compare(path, store)
    assert cells_of(store) == {("rating", "default", "MF", 1): folder}
    assert "resumed from" in (folder / "train.log").read_text()
    fresh = compare(path, tmp_path / "fresh")
    assert saved_metrics(folder) == saved_metrics(next(iter(cells_of(fresh).values())))


def test_a_record_that_was_not_written_is_written(write_comparison, tmp_path, inline):
    store = compare(write_comparison(seeds=[1]), tmp_path / "store")
    folder = next(iter(cells_of(store).values()))
    before = (folder / "metrics.json").stat().st_mtime_ns
    (folder / "cell.json").unlink()
    compare(write_comparison(seeds=[1]), store)
    assert json.loads((folder / "cell.json").read_text())["threads"] == 1
    assert (folder / "metrics.json").stat().st_mtime_ns == before


def test_a_worker_that_was_killed_leaves_an_error(write_comparison, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recbole_mmdiff.compare.runner.in_processes",
                        lambda function, jobs, *rest: [(job, {"error": DIED}) for job in jobs])
    command = ["compare", "--config", str(write_comparison(seeds=[1])), "--no-plots", "--output",
               str(tmp_path / "store")]
    assert main(command) == 1
    for folder in cells_of(tmp_path / "store").values():
        assert json.loads((folder / "error.json").read_text()) == {"error": DIED}
    assert capsys.readouterr().err.count("failed: ") == 2


def test_a_process_that_dies_before_it_reads_its_job():
    slot = _Slot(None)
    slot.send(one_job, {"what": "live", "number": 1})
    slot.process.kill()
    slot.process.join()
    assert "ended without an answer" in slot.receive()["error"] and slot.process is None


@pytest.mark.parametrize("keys", [{"workers": 0}, {"threads": 0}, {"gpus": -1}])
def test_senseless_numbers(keys, write_comparison, tmp_path):
    with pytest.raises(ConfigError, match="is too few"):
        compare(write_comparison(), tmp_path / "store", **keys)
