"""Warm start (DiffCDR, Figure 3): cross-domain models go on from their cold-start predictions."""

import numpy as np
import pytest
import torch
from contract import ModelContract
from running import FINETUNED_MODELS, Killed, assert_same_weights, contract_of, run_keys, saved_metrics

from recbole_mmdiff.quick_start import run
from recbole_mmdiff.trainer import StagedTrainer

WARM = {"split_protocol": "warm_start", "eval_step": 1, "finetune_epochs": 3}


def keys_of(model: str, **keys) -> dict:
    return {**contract_of(model).keys, **WARM, **keys}


def finetuned_users(parts) -> torch.Tensor:
    """Of a ranking model, those with a positive row."""
    return torch.unique(parts.train.finetune.inter_feat[parts.observed.uid_field])


@pytest.fixture(scope="module")
def warm_run(tiny_config, tmp_path_factory):
    """``warm_run(model, **keys)``: a run under warm start, made once."""
    made = {}

    def make(model, **keys):
        name = (model, *sorted(keys.items()))
        if name not in made:
            folder = tmp_path_factory.mktemp(model) / "run"
            made[name] = run_keys(tiny_config(model, **keys_of(model, **keys)), folder)
        return made[name]

    return make


@pytest.mark.parametrize("model", FINETUNED_MODELS)
def test_it_starts_from_the_cold_start_predictions(model, warm_run):
    """Fine-tuning with no step at all predicts what the cold model predicts, for everybody."""
    if model == "Bias":
        pytest.skip("a closed form: tested below")
    cold, still = warm_run(model, finetune_epochs=0), warm_run(model, finetune_learning_rate=0.0)
    assert [entry["stage"] for entry in still.metrics["history"]][-3:] == ["finetune"] * 3
    assert not any(entry["stage"] == "finetune" for entry in cold.metrics["history"])
    torch.testing.assert_close(ModelContract.scores(still), ModelContract.scores(cold),
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("model", "keys"), [
    *((model, {}) for model in FINETUNED_MODELS),
    # Decay would also shrink those whom no row moves.
    ("EMCDR", {"weight_decay": 0.05}), ("CoNet", {"weight_decay": 0.05})], ids=str)
def test_it_moves_the_held_out_users_alone(model, keys, warm_run):
    keys = {**keys, "eval_step": 0}     # The last epoch, also where validation would keep the start.
    cold, warm = warm_run(model, **keys, finetune_epochs=0), warm_run(model, **keys)
    users = finetuned_users(warm.parts)
    held_out = torch.cat([torch.unique(part.inter_feat[part.uid_field])
                          for part in (warm.parts.valid, warm.parts.test)])
    assert set(users.tolist()) <= set(held_out.tolist())
    before, after = ModelContract.scores(cold), ModelContract.scores(warm)
    others = torch.ones(len(before), dtype=torch.bool)
    others[users] = False
    torch.testing.assert_close(after[others], before[others], rtol=1e-5, atol=1e-5)
    assert ((after - before)[users].abs().amax(1) > 1e-5).float().mean() > 0.9


@pytest.mark.parametrize("model", ["CMF", "DiffCDR", "BiTGCF", "P2M2CDR", "SSCDR", "PTUPCDR", "CoNet"])
def test_killed_inside_and_resumed(model, warm_run, tiny_config, tmp_path, monkeypatch):
    whole, save = warm_run(model), StagedTrainer._save

    def save_and_die(trainer, loader=None, finished=False):
        save(trainer, loader, finished)
        if trainer.progress.history[-1]["stage"] == "finetune" and not finished:
            raise Killed

    monkeypatch.setattr(StagedTrainer, "_save", save_and_die)
    arguments = {"config_dict": tiny_config(model, **keys_of(model)), "output": tmp_path / "run"}
    for _ in range(3):
        with pytest.raises(Killed):
            run(**arguments)
        arguments = {"resume": tmp_path / "run"}
    resumed = run(**arguments)
    assert_same_weights(resumed.model, whole.model)
    assert saved_metrics(resumed.folder) == saved_metrics(whole.folder)


@pytest.mark.parametrize("model", ["CMF", "EMCDR"])
def test_the_later_half_is_never_learned_from(model, warm_run, tiny_pair, tiny_config, atomic, tmp_path):
    """Other ratings in the rows that are tested: the same weights, bit for bit."""
    whole = warm_run(model)
    test = whole.parts.test
    tested = {(test.field2id_token[test.uid_field][user], test.field2id_token[test.iid_field][item])
              for user, item in zip(test.inter_feat[test.uid_field].tolist(),
                                    test.inter_feat[test.iid_field].tolist(), strict=True)}
    rows = [(user, item, str(6 - int(rating)) if (user, item) in tested else rating, time)
            for user, item, rating, time in tiny_pair.target_rows]
    assert rows != tiny_pair.target_rows
    atomic.write(tmp_path, "tgt", rows)
    atomic.write(tmp_path, "src", tiny_pair.source_rows)
    changed = run_keys(tiny_config(model, data_path=tmp_path, **keys_of(model)), tmp_path / "run")
    assert changed.metrics["test"] != whole.metrics["test"]
    assert_same_weights(changed.model, whole.model)


def test_users_and_items(warm_run):
    """``finetune_items`` also moves items, and with them everybody's scores."""
    cold, users = warm_run("EMCDR", finetune_epochs=0), warm_run("EMCDR")
    both = warm_run("EMCDR", finetune_items=True)
    name = "target.item_embedding.weight"
    items = [made.model.state_dict()[name] for made in (cold, users, both)]
    assert torch.equal(items[0], items[1]) and not torch.equal(items[0], items[2])


def test_where_it_harms_the_start_is_kept(warm_run):
    """Validation users choose the epoch, and none at all is one of the choices."""
    cold = warm_run("EMCDR", finetune_epochs=0, valid_metric="RMSE")
    harmed = warm_run("EMCDR", finetune_learning_rate=5.0, valid_metric="RMSE")
    assert harmed.metrics["best_epoch"] == -1
    assert harmed.metrics["test"] == cold.metrics["test"]


def test_fine_tuning_helps(warm_run):
    """More is known of the users who are tested, so that the error falls."""
    keys = {"pretrain_epochs": 60, "pretrain_learning_rate": 0.01, "reg_weight": 0.02, "epochs": 30,
            "valid_metric": "RMSE"}
    cold = warm_run("EMCDR", **keys, finetune_epochs=0)
    warm = warm_run("EMCDR", **keys, finetune_epochs=20, finetune_learning_rate=0.02)
    rmse = [made.metrics["test"]["rating"]["rmse"] for made in (cold, warm)]
    assert rmse[1] < 0.97 * rmse[0]


def test_bias_by_hand(warm_run):
    """The user bias counts the earlier target rows as it counts those of the source domain."""
    made = warm_run("Bias")
    parts, model = made.parts, made.model
    finetune = parts.observed.finetune
    user = int(finetuned_users(parts)[0])
    total, count = 0.0, 0
    for domain in (finetune, parts.train.source):
        if domain is finetune:
            mean, bias = model.mean.item(), model.item_bias.double().numpy()
        else:
            rating = domain.inter_feat["rating"].double().numpy()
            item, mean = domain.inter_feat[domain.iid_field].numpy(), rating.mean()
            damping = made.config["item_damping"]
            bias = np.array([(rating[item == i] - mean).sum() / max((item == i).sum() + damping, 1e-9)
                             for i in range(domain.item_num)])
        for u, i, r in zip(*(domain.inter_feat[f].tolist() for f in
                             (domain.uid_field, domain.iid_field, "rating")), strict=True):
            if u == user:
                total, count = total + r - mean - bias[i], count + 1
    expected = total / (count + made.config["user_damping"])
    assert model.user_bias[user].item() == pytest.approx(expected, abs=1e-5)


def test_a_model_of_recbole_says_that_its_users_stay_cold(tiny_config, tmp_path):
    run_keys(tiny_config("BPR", **WARM), tmp_path / "run")
    assert "which is not done" in (tmp_path / "run" / "train.log").read_text()
