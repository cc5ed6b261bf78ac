"""How much sooner an epoch ends on two processes of one thread each than on one, by the share of it that is
computed by parts."""

import pytest

from recbole_mmdiff.quick_start import run

#: the embedded pair, with networks of the papers' sizes; batches large enough to be worth sharing
KEYS = {"use_gpu": False, "log_tensorboard": False, "keep_data": False, "eval_step": 0, "epochs": 3}
MODELS = {
    "MuSiC": {"pretrain_epochs": 1, "feature_epochs": 1, "side_epochs": 1, "train_batch_size": 512},
    "MMDCDR": {"pretrain_epochs": 1, "diffusion_epochs": 1, "train_batch_size": 512},
    "DiffCDR": {"pretrain_epochs": 1, "sampling_path": "general", "train_batch_size": 4096},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_against_one(model, tmp_path, monkeypatch):
    """The last stage's epochs but for the first; the losses are the same."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seconds, losses = {}, {}
    for count in (1, 2):
        keys = {**KEYS, **MODELS[model], "data_path": str(tmp_path / "data"), "nproc": count}
        made = run(model, config_dict=keys, output=tmp_path / f"{count}", console=False)
        entries = made.metrics["history"][-2:]
        seconds[count] = sum(entry["seconds"] for entry in entries)
        losses[count] = [entry["loss"] for entry in entries]
    print(f"\n{model}: an epoch takes {seconds[1] / 2:.2f} s on one process, {seconds[2] / 2:.2f} s on two: "
          f"{seconds[1] / seconds[2]:.2f}x")
    assert losses[2] == [pytest.approx(loss, rel=1e-3) for loss in losses[1]]
    assert seconds[1] / seconds[2] > 1
