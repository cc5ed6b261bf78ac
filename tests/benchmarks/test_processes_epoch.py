"""How much sooner an epoch ends on two processes of one thread each than on one.

The data of ``test_profile_transfer``, the models in the forms of their papers, in batches that are large
enough to be worth sharing.
"""

import pytest
from test_profile_transfer import DIMS, ITEMS, LINKED, write_pair

from recbole_mmdiff.quick_start import run

KEYS = {"paper": True, "source_domain": {"dataset": "left"}, "target_domain": {"dataset": "right"},
        "use_gpu": False, "log_tensorboard": False, "keep_data": False, "eval_step": 0, "epochs": 3,
        "pretrain_epochs": 1}
MODELS = {
    "MuSiC": {"feature_epochs": 1, "side_epochs": 1, "train_batch_size": 1024},
    "MMDCDR": {"diffusion_epochs": 1, "train_batch_size": 512, "guidance_scale": 2.0},
    "DiffCDR": {"sampling_path": "general", "train_batch_size": 8192},
}
# Measured on an idle machine of two cores: 0.8, 1.7, 1.2.
LEAST = {"MuSiC": 0.5, "MMDCDR": 1.3, "DiffCDR": 0.9}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_against_one(model, tmp_path, monkeypatch):
    """The last stage's epochs but for the first; the losses are the same."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = write_pair(tmp_path, LINKED, ITEMS, 14, DIMS)
    seconds, losses = {}, {}
    for count in (1, 2):
        keys = {**KEYS, **MODELS[model], "data_path": str(folder), "nproc": count}
        made = run(model, config_dict=keys, output=tmp_path / f"{count}", console=False)
        entries = made.metrics["history"][-2:]
        seconds[count] = sum(entry["seconds"] for entry in entries)
        losses[count] = [entry["loss"] for entry in entries]
    ratio = seconds[1] / seconds[2]
    print(f"\n{model}: an epoch takes {seconds[1] / 2:.2f} s on one process, {seconds[2] / 2:.2f} s on two: "
          f"{ratio:.2f}x")
    assert losses[2] == [pytest.approx(loss, rel=1e-3) for loss in losses[1]]
    assert ratio > LEAST[model]
