"""What a resumed run may not change: configuration, split, data."""

import pytest
import torch
from running import Killed

from recbole_mmdiff.errors import CheckpointError, ConfigError, DataError
from recbole_mmdiff.quick_start import run
from recbole_mmdiff.storage import load_plain, save_plain
from recbole_mmdiff.trainer import StagedTrainer


@pytest.fixture
def killed(make_tiny_pair, tiny_config, tmp_path, monkeypatch):
    """The folder of a run that died after its first checkpoint."""
    make_tiny_pair(tmp_path / "data")
    with monkeypatch.context() as patch:
        save = StagedTrainer._save

        def save_and_die(trainer, *args, **kwargs):
            save(trainer, *args, **kwargs)
            raise Killed

        patch.setattr(StagedTrainer, "_save", save_and_die)
        with pytest.raises(Killed):
            run(config_dict=tiny_config("MF", data_path=str(tmp_path / "data"), epochs=3),
                output=tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(("keys", "named"), [
    ({"test_user_ratio": 0.6}, "test_user_ratio was 0.2"), ({"seed": 3}, "seed was 2020"),
    ({"learning_rate": 0.5}, "learning_rate was"), ({"split_seed": 9}, "split_seed was None")])
def test_keys_of_the_experiment_stay(killed, keys, named):
    with pytest.raises(ConfigError, match=f"--resume: .*: {named}"):
        run(resume=killed, overrides=keys)


def test_the_length_may_change(killed):
    finished = run(resume=killed, overrides={"epochs": 4, "state": "ERROR"})
    assert [entry["epoch"] for entry in finished.metrics["history"]] == [0, 1, 2, 3]


def test_the_same_command_again_with_resume(killed, tiny_config, tmp_path):
    keys = tiny_config("MF", data_path=str(tmp_path / "data"), epochs=3)
    assert run(config_dict=keys, resume=killed).metrics["test"]["rating"]["rmse"] > 0


def test_other_data_are_refused(killed, tmp_path):
    path = tmp_path / "data" / "tgt" / "tgt.inter"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[200:]]) + "\n")
    with pytest.raises(DataError, match="--resume: the data no longer give the split"):
        run(resume=killed)


def spoiled(state, keys, value):
    """A state with another value at a place, or without the place."""
    for key in keys[:-1]:
        state = state[key]
    if value is None:
        del state[keys[-1]]
    else:
        state[keys[-1]] = value


@pytest.mark.parametrize(("keys", "value"), [
    (["config", "learning_rate"], torch.zeros(2)),
    (["state_dict"], None), (["model"], None), (["state_dict"], {"x": 1}), (["other_parameter"], {"to": 3}),
    (["numbers", "epoch"], "x"), (["progress", "epoch"], "1"), (["progress", "stage"], -1),
    (["progress", "best_score"], "x"), (["progress"], {"what": 1}), (["progress", "history"], [{}]),
    (["best_valid_result"], None), (["random", "torch"], None), (["random", "torch"], torch.zeros(3)),
    (["random", "numpy"], 3), (["best", "weights"], {}), (["optimizers"], {"x": {}}),
    (["optimizers", "optimizer", "param_groups", 0, "lr"], "x"),
    (["optimizers", "optimizer", "param_groups", 0, "betas"], 3),
    (["optimizers", "optimizer", "state", 0, "exp_avg"], 3.0),
    (["optimizers", "optimizer", "state", 0, "exp_avg"], None),
    (["optimizers", "optimizer", "state", 0, "exp_avg"], torch.zeros(1, 2))])
def test_a_checkpoint_of_another_form_is_refused(killed, keys, value):
    state = load_plain(killed / "checkpoint.pth")
    spoiled(state, keys, value)
    save_plain(state, killed / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth: "):
        run(resume=killed)
