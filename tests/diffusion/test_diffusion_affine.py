"""The collapsed sampler equals the general one."""

import pytest
import torch

from recbole_mmdiff.diffusion import (
    MLPDenoiser,
    VPSchedule,
    collapse,
    ddim_plan,
    dpm_solver_plan,
    dpm_solver_pp_plan,
    sample,
)

VP = VPSchedule()
PLANS = {
    "dpm_solver": dpm_solver_plan(VP, 30),
    "dpm_solver_2": dpm_solver_plan(VP, 9, 2),
    "pp": dpm_solver_pp_plan(VP, 20, 3),
    "ddim": ddim_plan(VP, 15, spacing="time"),
}


def diffcdr_time(t):
    return 1000.0 * max(t - 1 / 1000, 0.0)


def network(activation="none", **options):
    torch.manual_seed(7)
    return MLPDenoiser(10, 10, hidden_activation=activation, **options).double()


def source(rows=64, dim=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator, dtype=torch.float64)


def assert_same(result, expected):
    """Equal to 1e-10 of the largest value."""
    assert (result - expected).abs().max() <= 1e-10 * expected.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("name", PLANS)
def test_collapse_equals_the_general_sampler(name, scale):
    """DiffCDR's setting: x_T and the condition are the source embedding."""
    denoiser, x = network(), source()
    arguments = (denoiser, x, x, PLANS[name], scale, diffcdr_time)
    general = sample(*arguments, method="general")
    assert_same(sample(*arguments, method="affine"), general)
    assert torch.equal(sample(*arguments), sample(*arguments, method="affine"))
    assert_same(sample(denoiser, x, x.clone(), *arguments[3:]), general)
    assert not sample(*arguments).requires_grad and not general.requires_grad


@pytest.mark.parametrize("keep_input", [False, True])
def test_other_start_and_other_sizes(keep_input):
    torch.manual_seed(3)
    denoiser = MLPDenoiser(6, 4, (16,), 8, keep_input=keep_input).double()
    x, condition = source(9, 6), source(9, 4, seed=1)
    general = sample(denoiser, x, condition, PLANS["dpm_solver"], 0.7, method="general")
    assert_same(sample(denoiser, x, condition, PLANS["dpm_solver"], 0.7), general)
    shapes = collapse(denoiser, PLANS["dpm_solver"], 0.7)
    assert shapes.x_weight.shape == (6, 6) and shapes.condition_weight.shape == (4, 6)
    assert shapes.bias.shape == (6,)


def test_new_weights_are_seen():
    denoiser, x = network(), source()
    first = sample(denoiser, x, x, PLANS["dpm_solver"], 0.1, diffcdr_time)
    with torch.no_grad():
        denoiser.layers[1].weight.mul_(0.5)
    second = sample(denoiser, x, x, PLANS["dpm_solver"], 0.1, diffcdr_time)
    assert not torch.allclose(first, second)
    assert_same(second, sample(denoiser, x, x, PLANS["dpm_solver"], 0.1, diffcdr_time, "general"))


def test_float32_keeps_float32_accuracy():
    denoiser, x = network(), source()
    exact = sample(denoiser, x, x, PLANS["dpm_solver"], 0.1, diffcdr_time)
    single = sample(denoiser.float(), x.float(), x.float(), PLANS["dpm_solver"], 0.1, diffcdr_time)
    assert single.dtype == torch.float32
    assert (single.double() - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh", "gelu"])
def test_a_non_linear_network_is_not_affine(activation):
    denoiser, x = network(activation), source()
    assert network().is_affine and not denoiser.is_affine
    assert MLPDenoiser(4, 4, (), hidden_activation=activation).is_affine
    general = sample(denoiser, x, x, PLANS["pp"], 0.1, diffcdr_time, "general")
    assert torch.equal(sample(denoiser, x, x, PLANS["pp"], 0.1, diffcdr_time), general)
    with pytest.raises(ValueError, match=f"hidden_activation='{activation}'"):
        sample(denoiser, x, x, PLANS["pp"], 0.1, diffcdr_time, "affine")


def test_bad_arguments_are_named():
    denoiser, x = network(), source()
    with pytest.raises(ValueError, match=r"method='fast'.*auto"):
        sample(denoiser, x, x, PLANS["pp"], method="fast")
    with pytest.raises(ValueError, match="condition has 3 rows"):
        sample(denoiser, x, x[:3], PLANS["pp"])
    with pytest.raises(ValueError, match="plan adds noise"):
        collapse(denoiser, ddim_plan(VP, 5, 1.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_same_on_the_gpu():
    denoiser, x = network(), source()
    expected = sample(denoiser, x, x, PLANS["dpm_solver"], 0.1, diffcdr_time)
    for method in ("affine", "general"):
        result = sample(denoiser.cuda(), x.cuda(), x.cuda(), PLANS["dpm_solver"], 0.1, diffcdr_time, method)
        assert_same(result.cpu(), expected)
