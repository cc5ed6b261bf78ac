"""EMCDR: the contract, and the loss of the mapping by hand."""

import numpy as np
import pytest
import torch
from contract import ModelContract
from recbole.data.interaction import Interaction
from running import LEARNING, PRETRAINING, run_keys


class TestEMCDR(ModelContract):
    """Two factorisations and a linear map."""

    model = "EMCDR"
    keys = PRETRAINING
    accurate_keys = LEARNING
    best_rmse_ratio = 0.95


@pytest.mark.parametrize("standardize", [True, False])
def test_mapping_loss_by_hand(standardize, tiny_config, tmp_path):
    """The mean of (W u_s - u_t)^2, on standardised vectors or on raw ones."""
    keys = tiny_config("EMCDR", standardize=standardize, **PRETRAINING)
    run = run_keys(keys, tmp_path / "run")
    model, overlap = run.model, run.model.overlap_users.tolist()
    vectors = {}
    for domain in ("source", "target"):
        table = getattr(model, domain).user_factors(torch.arange(model.n_users)).detach().double().numpy()
        center = table[overlap].mean(0) if standardize else 0.0
        scale = table[overlap].std(0, ddof=1) if standardize else 1.0
        vectors[domain] = (table - center) / scale
    weight = model.mapping[0].weight.detach().double().numpy()
    users = overlap[:5]
    errors = [(weight @ vectors["source"][user] - vectors["target"][user])**2 for user in users]
    found = model.mapping_loss(Interaction({"user_id": torch.tensor(users)}))
    assert found.item() == pytest.approx(np.mean(errors), rel=1e-4)
    cold = int(torch.unique(run.parts.test.inter_feat["user_id"])[0])
    mapped = weight @ vectors["source"][cold]
    if standardize:
        table = model.target.user_factors(torch.tensor(overlap)).detach().double().numpy()
        mapped = mapped * table.std(0, ddof=1) + table.mean(0)
    np.testing.assert_allclose(model.user_factors(torch.tensor([cold]))[0].detach(), mapped, atol=1e-4)


def test_the_base_is_frozen_while_mapping(tiny_config, tmp_path):
    short, long = (run_keys(tiny_config("EMCDR", epochs=epochs, eval_step=0, **PRETRAINING),
                            tmp_path / str(epochs)) for epochs in (1, 4))
    for name, value in short.model.state_dict().items():
        if name.startswith(("source", "target")):
            assert torch.equal(value, long.model.state_dict()[name]), name
    assert not torch.equal(short.model.mapping[0].weight, long.model.mapping[0].weight)


def test_a_hidden_layer(tiny_config, tmp_path):
    keys = tiny_config("EMCDR", mapping_hidden_sizes=[7], mapping_bias=True, **PRETRAINING)
    model = run_keys(keys, tmp_path / "run").model
    assert [type(layer).__name__ for layer in model.mapping] == ["Linear", "Tanh", "Linear"]
    assert model.mapping[0].bias.shape == (7,)


def test_a_user_with_target_rows_keeps_the_trained_vector(tiny_config, tmp_path):
    run = run_keys(tiny_config("EMCDR", **PRETRAINING), tmp_path / "run")
    warm = run.parts.train.users_with_rows()
    assert torch.equal(run.model.user_factors(warm), run.model.target.user_factors(warm))


def test_where_nobody_is_cold_the_log_says_so(tiny_config, tmp_path):
    """Under ``ratio`` all users have target rows: nothing is transferred, whatever the mapping."""
    run_keys(tiny_config("EMCDR", split_protocol="ratio", **PRETRAINING), tmp_path / "ratio")
    assert "no test user of this split is cold" in (tmp_path / "ratio" / "train.log").read_text()
    run_keys(tiny_config("EMCDR", **PRETRAINING), tmp_path / "cold")
    assert "no test user" not in (tmp_path / "cold" / "train.log").read_text()


def test_a_user_of_neither_domain_is_the_mean_user(tiny_config, tmp_path):
    """[PAD] is one."""
    model = run_keys(tiny_config("EMCDR", **PRETRAINING), tmp_path / "run").model
    mean = model.target.user_factors(model.overlap_users).mean(0)
    assert model.is_unknown[0] and not model.is_unknown[model.overlap_users].any()
    torch.testing.assert_close(model.user_factors(torch.tensor([0]))[0], mean)
