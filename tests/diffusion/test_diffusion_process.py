"""Forward process, posterior, losses, antithetic steps, guidance and the noise network."""

import math

import pytest
import torch
from torch.nn import functional

from recbole_mmdiff.diffusion import (
    MLPDenoiser,
    VPSchedule,
    antithetic_steps,
    diffusion_loss,
    drop_condition,
    eps_from_x0,
    guided_noise,
    keyed_antithetic_steps,
    keyed_uniform,
    linear_schedule,
    noise_from_x0,
    posterior,
    q_sample,
    sinusoidal_embedding,
    x0_from_eps,
)


def draws(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_q_sample_and_conversions():
    x0, noise, t = draws(4, 3), draws(4, 3, seed=1), torch.tensor([0.01, 0.3, 0.7, 1.0]).double()
    schedule = VPSchedule()
    alpha, sigma = schedule.alpha_sigma(t)
    x_t = q_sample(x0, noise, alpha, sigma)
    for i in range(4):
        for j in range(3):
            a, s = schedule.alpha(t[i].item()), schedule.sigma(t[i].item())
            assert x_t[i, j].item() == pytest.approx(a * x0[i, j].item() + s * noise[i, j].item())
    torch.testing.assert_close(x0_from_eps(x_t, noise, alpha, sigma), x0)
    torch.testing.assert_close(eps_from_x0(x_t, x0, alpha, sigma), noise)
    torch.testing.assert_close(q_sample(x0, noise, 0.6, 0.8), 0.6 * x0 + 0.8 * noise)
    tokens = q_sample(draws(4, 2, 3), draws(4, 2, 3), alpha, sigma)
    assert tokens.shape == (4, 2, 3)


@pytest.mark.parametrize("num_steps", [5, 40])
def test_posterior_is_bayes(num_steps):
    """Product of the Gaussian densities q(x_{n-1} | x_0) and q(x_n | x_{n-1}), by hand."""
    schedule = linear_schedule(num_steps)
    x0, x_t = draws(3, 2), draws(3, 2, seed=5)
    for step in range(2, num_steps + 1):
        mean, variance = posterior(x0, x_t, step, schedule)
        beta, before = schedule.betas[step - 1], schedule.alpha_bar(step - 1)
        precision = 1 / (1 - before) + (1 - beta) / beta
        assert variance == pytest.approx(1 / precision, rel=1e-9)
        for i in range(3):
            for j in range(2):
                pull = math.sqrt(before) * x0[i, j].item() / (1 - before)
                pull += math.sqrt(1 - beta) * x_t[i, j].item() / beta
                assert mean[i, j].item() == pytest.approx(pull / precision, rel=1e-9, abs=1e-12)


def test_posterior_first_step_and_tensor_steps():
    schedule = linear_schedule(10)
    x0, x_t, steps = draws(4, 2), draws(4, 2, seed=1), torch.tensor([1, 3, 10, 7])
    mean, variance = posterior(x0, x_t, steps, schedule)
    assert variance.shape == (4, 1)
    for i, step in enumerate(steps.tolist()):
        row_mean, row_variance = posterior(x0[i], x_t[i], step, schedule)
        torch.testing.assert_close(mean[i], row_mean)
        assert variance[i, 0].item() == pytest.approx(row_variance)
    torch.testing.assert_close(mean[0], x0[0])
    with pytest.raises(ValueError, match="step=11"):
        posterior(x0, x_t, 11, schedule)


def test_diffusion_loss_against_a_loop():
    output, x0, noise = draws(5, 3), draws(5, 3, seed=1), draws(5, 3, seed=2)
    for parametrisation, target in {"eps": noise, "x0": x0}.items():
        for kind in ("mse", "smooth_l1"):
            rows = []
            for i in range(5):
                row = []
                for j in range(3):
                    gap = abs(output[i, j].item() - target[i, j].item())
                    huber = 0.5 * gap**2 if gap < 1 else gap - 0.5
                    row.append(gap**2 if kind == "mse" else huber)
                rows.append(sum(row) / 3)
            each = diffusion_loss(output, x0, noise, parametrisation, kind, "none")
            torch.testing.assert_close(each, torch.tensor(rows).double(), rtol=1e-6, atol=1e-7)
            mean = diffusion_loss(output, x0, noise, parametrisation, kind)
            assert mean.item() == pytest.approx(sum(rows) / 5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"parametrisation": "v"}, "parametrisation='v'"),
        ({"kind": "l1"}, "kind='l1'.*smooth_l1"),
        ({"reduction": "sum"}, "reduction='sum'"),
        ({"noise": draws(2, 4)}, "output has shape"),
    ],
)
def test_diffusion_loss_names_bad_arguments(options, named):
    arguments = {"output": draws(2, 3), "x0": draws(2, 3), "noise": draws(2, 3)} | options
    with pytest.raises(ValueError, match=named):
        diffusion_loss(**arguments)


def test_antithetic_steps():
    steps = antithetic_steps(7, 1000, torch.Generator().manual_seed(3))
    assert steps.shape == (7,) and torch.equal(steps[:3] + steps[4:], torch.full((3,), 1001))
    keys = torch.arange(20_000)
    keyed = keyed_antithetic_steps(keys, 10, seed=4)
    assert torch.equal(keyed[::2] + keyed[1::2], torch.full((10_000,), 11))
    counts = torch.bincount(keyed, minlength=11)
    assert counts[0] == 0 and (counts[1:] - 2000).abs().max() < 200
    order = torch.randperm(20_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keyed_antithetic_steps(order, 10, 4), keyed[order])
    with pytest.raises(ValueError, match="num_steps=0"):
        antithetic_steps(4, 0)


def test_drop_condition():
    uniform = keyed_uniform(torch.arange(50_000), 1, seed=1)
    keep = drop_condition(uniform, 0.1)
    assert keep.shape == (50_000, 1) and set(keep.unique().tolist()) == {0.0, 1.0}
    assert keep.mean().item() == pytest.approx(0.9, abs=0.006)
    assert drop_condition(uniform[:, 0], 0.0).all() and not drop_condition(uniform, 1.0).any()
    with pytest.raises(ValueError, match=r"probability=1\.5"):
        drop_condition(uniform, 1.5)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("keep_input", [False, True])
def test_guidance_equals_two_forwards_in_one(scale, keep_input):
    torch.manual_seed(0)
    network = MLPDenoiser(4, 3, (8,), 6, "silu", keep_input).double()
    x, condition, calls = draws(5, 4), draws(5, 3, seed=1), []

    def counted(*arguments):
        calls.append(arguments[0].shape[0])
        return network(*arguments)

    result = guided_noise(counted, condition, scale, lambda t: 1000 * t)(x, 0.25)
    conditional = network(x, 250.0, condition, torch.ones(5, 1).double())
    unconditional = network(x, 250.0, condition, torch.zeros(5, 1).double())
    torch.testing.assert_close(result, unconditional + scale * (conditional - unconditional))
    assert len(calls) == 1
    with pytest.raises(ValueError, match="x has 4 rows"):
        guided_noise(network, condition, scale)(x[:4], 0.25)


def test_noise_from_x0():
    schedule, x, x0 = VPSchedule(), draws(4, 3), draws(4, 3, seed=1)
    eps = noise_from_x0(lambda state, t: x0, schedule)(x, 0.4)
    torch.testing.assert_close(schedule.alpha(0.4) * x0 + schedule.sigma(0.4) * eps, x)


@pytest.mark.parametrize("dim", [4, 10, 128])
def test_sinusoid_against_a_loop(dim):
    times, half = [0.0, 0.5, 37.0, 999.0], dim // 2
    rows = []
    for t in times:
        angles = [t * math.exp(-math.log(10000.0) * i / (half - 1)) for i in range(half)]
        rows.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    expected = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(
        sinusoidal_embedding(torch.tensor(times).double(), dim), expected, rtol=0, atol=1e-12
    )
    for t, row in zip(times, expected, strict=True):
        torch.testing.assert_close(sinusoidal_embedding(t, dim, torch.float64), row, rtol=0, atol=1e-12)
    integers = sinusoidal_embedding(torch.tensor([37, 999]), dim)
    torch.testing.assert_close(integers.double(), expected[2:], rtol=0, atol=2e-4)


def test_network_is_the_published_one():
    """DiffCDR: mask after the bias, no activation, 10-128-128-10."""
    torch.manual_seed(1)
    network = MLPDenoiser(10, 10).double()
    assert [tuple(layer.weight.shape) for layer in network.layers] == [
        (128, 10),
        (128, 128),
        (10, 128),
    ]
    x, condition = draws(3, 10), draws(3, 10, seed=1)
    keep, t = (
        torch.tensor([[1.0], [0.0], [1.0]]).double(),
        torch.tensor([3.0, 500.0, 999.0]).double(),
    )
    hidden = x + network.time_linear(sinusoidal_embedding(t, 128))
    hidden = hidden + keep * functional.linear(
        condition, network.condition_linear.weight, network.condition_linear.bias
    )
    for layer in network.layers:
        hidden = layer(hidden)
    torch.testing.assert_close(network(x, t, condition, keep), hidden)
    torch.testing.assert_close(network(x[1:2], 500.0, condition[1:2], keep[1:2]), hidden[1:2])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dim": 0}, "dim=0"),
        ({"condition_dim": 0}, "condition_dim=0"),
        ({"hidden_sizes": (8, 0)}, r"hidden_sizes\[1\]=0"),
        ({"time_dim": 7}, "time_dim=7"),
        ({"time_dim": 2}, "time_dim=2"),
        ({"hidden_activation": "swish"}, "hidden_activation='swish'.*silu"),
    ],
)
def test_network_names_bad_arguments(options, named):
    with pytest.raises(ValueError, match=named):
        MLPDenoiser(**({"dim": 4, "condition_dim": 4} | options))
