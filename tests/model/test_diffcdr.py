"""DiffCDR: the contract, its losses by hand, and its two ways to sample."""

import math

import numpy as np
import pytest
import torch
from contract import ModelContract
from recbole.data.interaction import Interaction
from running import LEARNING, PRETRAINING, run_keys
from torch import nn

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.diffusion import (
    fold_in,
    keyed_antithetic_steps,
    keyed_normal,
    keyed_uniform,
)
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.quick_start import load_run


class TestDiffCDR(ModelContract):
    """Two factorisations, then DIM and ALM in turn."""

    model = "DiffCDR"
    keys = PRETRAINING
    accurate_keys = {**LEARNING, "learning_rate": 0.003, "stopping_step": 20}
    best_rmse_ratio = 0.9


BATCH = Interaction({"user_id": torch.tensor([1, 2, 1, 5]), "item_id": torch.tensor([3, 3, 9, 1]),
                     "rating": torch.tensor([4.0, 2.0, 5.0, 1.0]),
                     "sample_id": torch.tensor([10, 11, 12, 29])})


@pytest.fixture
def make(tiny_config):
    """``make(**keys)``: a model with random weights whose spaces are frozen, ready for transfer."""

    def build(**keys):
        torch.manual_seed(4)
        config = Config(config_dict=tiny_config("DiffCDR", embedding_size=3, **keys))
        model = config.model_class(config, prepare_parts(config).train)
        for domain in ("source", "target"):
            for table in getattr(model, domain).children():
                nn.init.normal_(table.weight)
        model.seed, model.epoch = 77, 2
        model.freeze_spaces()
        return model

    return build


def smooth_l1(difference):
    size = abs(difference)
    return 0.5 * size**2 if size < 1 else size - 0.5


def slow_network(model, x, time, condition, keep):
    """The noise network of one row in numpy."""
    weights = {name: value.detach().double().numpy()
               for name, value in model.denoiser.named_parameters()}
    half = model.denoiser.time_dim // 2
    angles = [time * 10000**(-i / (half - 1)) for i in range(half)]
    sinusoid = np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    hidden = x + weights["time_linear.weight"] @ sinusoid + weights["time_linear.bias"]
    guidance = weights["condition_linear.weight"] @ condition + weights["condition_linear.bias"]
    hidden = hidden + keep * guidance
    for number in range(len(model.denoiser.layers)):
        hidden = weights[f"layers.{number}.weight"] @ hidden + weights[f"layers.{number}.bias"]
    return hidden


@pytest.mark.parametrize("path", ["auto", "general"])
@pytest.mark.parametrize("steps", [1000, 50])
def test_dim_loss_by_hand(make, path, steps):
    model = make(sampling_path=path, num_steps=steps, condition_drop_probability=0.5, dim_weight=3.0)
    ids = BATCH["sample_id"]
    step = keyed_antithetic_steps(ids, steps, fold_in(77, 2, 0)).tolist()
    noise = keyed_normal(ids, model.size, fold_in(77, 2, 1)).double().numpy()
    keep = (keyed_uniform(ids, 1, fold_in(77, 2, 2)) >= 0.5).double()[:, 0].tolist()
    betas = np.linspace(1e-4, 0.02, steps) * 1000 / steps
    kept = np.cumprod(1 - betas)
    losses = []
    for row, user in enumerate(BATCH["user_id"].tolist()):
        x0, condition = (getattr(model, f"{domain}_vectors")(torch.tensor([user]))[0].double().numpy()
                         for domain in ("target", "source"))
        alpha_bar = kept[step[row] - 1]
        x_t = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * noise[row]
        time = (step[row] - 1) * 1000 / steps
        error = slow_network(model, x_t, time, condition, keep[row]) - noise[row]
        losses += [smooth_l1(value) for value in error]
    assert model.dim_loss(BATCH).item() == pytest.approx(3.0 * np.mean(losses), rel=1e-4)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("task_weight", [0.0, 0.7])
def test_alm_loss_by_hand(make, norm, task_weight):
    model = make(alignment_norm=norm, alignment_weight=2.0, task_weight=task_weight)
    weight = model.alm.weight.detach().double().numpy()
    alignment, task = [], []
    for user, item, rating in zip(BATCH["user_id"].tolist(), BATCH["item_id"].tolist(),
                                  BATCH["rating"].tolist(), strict=True):
        drawn = model.sampled_vectors(torch.tensor([user]))[0].double().numpy()
        aligned = weight @ drawn
        error = aligned - model.target_vectors(torch.tensor([user]))[0].double().numpy()
        alignment += [smooth_l1(value) if norm == 1 else value**2 for value in error]
        vector = aligned * model.target_scale.double().numpy() + model.target_center.double().numpy()
        base = model.target
        score = vector[:3] @ base.item_embedding.weight[item].detach().double().numpy() + vector[3] \
            + base.mean.item() + base.item_bias.weight[item].item()
        task.append((score - rating)**2)
    expected = 2.0 * np.mean(alignment) + task_weight * np.mean(task)
    assert model.alm_loss(BATCH).item() == pytest.approx(expected, rel=1e-4)


def test_losses_train_what_they_should(make):
    """DIM's loss trains DIM, ALM's trains ALM; neither reaches the factorisations."""
    model = make(task_weight=1.0)
    for loss_of, trained in ((model.dim_loss, "denoiser"), (model.alm_loss, "alm")):
        model.zero_grad()
        loss_of(BATCH).backward()
        for name, parameter in model.named_parameters():
            moved = parameter.grad is not None and bool(parameter.grad.any())
            assert moved == name.startswith(trained), name


@pytest.mark.parametrize("keys", [{}, {"x_T": "noise"}, {"solver_order": 2}, {"guidance_scale": 2.0},
                                  {"hidden_sizes": []}, {"biases": False, "standardize": False}])
def test_affine_path_equals_the_general_one(make, keys):
    affine, general = (make(sampling_path=path, **keys).double() for path in ("affine", "general"))
    users = torch.arange(affine.n_users)
    for model in (affine, general):
        model.freeze_spaces()
    torch.testing.assert_close(affine.sampled_vectors(users), general.sampled_vectors(users),
                               rtol=1e-9, atol=1e-9)


def test_composed_layers_have_the_gradients_of_plain_ones(make):
    gradients = []
    for path in ("auto", "general"):
        model = make(sampling_path=path).double()
        model.freeze_spaces()
        loss = model.dim_loss(BATCH)
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in
                          model.denoiser.named_parameters()} | {"loss": loss.detach()})
    assert set(gradients[0]) == set(gradients[1])
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], rtol=1e-9, atol=1e-12, msg=name)


def test_start_noise_belongs_to_the_user(make):
    model = make(x_T="noise")
    users = torch.tensor([5, 2, 9])
    drawn = model.sampled_vectors(users)
    assert torch.equal(model.sampled_vectors(users), drawn)
    alone = torch.cat([model.sampled_vectors(user[None]) for user in users])
    torch.testing.assert_close(alone, drawn, rtol=1e-5, atol=1e-5)
    model.epoch = 9
    assert torch.equal(model.sampled_vectors(users), drawn)
    assert not torch.equal(make(x_T="source").sampled_vectors(users), drawn)


def test_start_noise_survives_saving(tiny_config, tmp_path):
    run = run_keys(tiny_config("DiffCDR", x_T="noise", **PRETRAINING), tmp_path / "run")
    users = torch.unique(run.parts.test.inter_feat["user_id"])
    loaded = load_run(run.folder)
    assert torch.equal(loaded.model.user_factors(users), run.model.user_factors(users))


def test_without_dim_the_alm_maps_the_source_vector(make):
    model = make(use_dim=False)
    users = torch.tensor([1, 2, 3])
    assert torch.equal(model.sampled_vectors(users), model.source_vectors(users))
    assert [len(stage.losses) for stage in model.stages()] == [1, 1, 1]


def test_paper_form(make):
    model = make(biases=False, standardize=False)
    users = torch.tensor([1, 2, 3])
    assert model.size == 3
    assert torch.equal(model.source_vectors(users), model.source.user_embedding.weight[users])
    assert torch.equal(model.in_target_space(model.target_vectors(users)),
                       model.target.user_embedding.weight[users])


def test_an_activation_takes_the_general_path(make):
    model = make(hidden_activation="silu")
    assert torch.isfinite(model.sampled_vectors(torch.arange(6))).all()
    with pytest.raises(ValueError, match="affine"):
        make(hidden_activation="silu", sampling_path="affine").sampled_vectors(torch.arange(6))


def test_weights_that_leave_nothing_to_learn_are_refused(make):
    with pytest.raises(ConfigError, match="alignment_weight, task_weight"):
        make(alignment_weight=0.0, task_weight=0.0)
