"""A process that is killed without warning in each stage, and its run gone on with."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from running import run_keys, saved_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ("source", "target", "transfer")
EPOCHS = 30


@pytest.fixture(scope="module")
def keys(tiny_config):
    """Epochs of many small batches, so that there is a middle to be killed in."""
    return tiny_config("DiffCDR", state="INFO", pretrain_epochs=EPOCHS, pretrain_batch_size=16,
                       epochs=EPOCHS, train_batch_size=16, eval_step=5, stopping_step=100)


def start(words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "recbole_mmdiff.cli", *words], cwd=ROOT,
                            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_in(stage, words, log):
    """Start a process and kill it once it has ended some epochs of ``stage``; the epochs done."""
    process = start(words)
    try:
        deadline = time.monotonic() + 120
        while True:
            text = log.read_text(encoding="utf-8") if log.is_file() else ""
            done = re.findall(rf"INFO {stage} epoch (\d+): loss", text)
            if len(done) > 3:
                break
            assert process.poll() is None and time.monotonic() < deadline, text
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    return len(re.findall(rf"INFO {stage} epoch (\d+): loss", log.read_text(encoding="utf-8")))


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a matter of POSIX")
def test_killed_in_every_stage(keys, tmp_path):
    file, folder = tmp_path / "keys.yaml", tmp_path / "killed"
    file.write_text(yaml.safe_dump(keys), encoding="utf-8")
    words = ["--config", str(file), "--output", str(folder)]
    for stage in STAGES:
        done = kill_in(stage, words, folder / "train.log")
        assert 0 < done < EPOCHS, f"{stage} was over before the process was killed"
        assert not (folder / "metrics.json").exists()
        words = ["--resume", str(folder)]
    assert start(words).wait(timeout=120) == 0
    log = (folder / "train.log").read_text(encoding="utf-8")
    for number in range(len(STAGES)):
        assert f"stage {number}, epoch" in log
    whole = run_keys(keys, tmp_path / "whole")
    assert saved_metrics(folder) == saved_metrics(whole.folder)
