"""The whole reverse chain with gradient, driven by a network that predicts data."""

import math

import pytest
import torch

from recbole_mmdiff.diffusion import (
    VectorUNet,
    ddpm,
    ddpm_plan,
    fold_in,
    keyed_normal,
    linear_schedule,
    noise_from_x0,
    posterior,
    run_plan,
)

DIM = 6
SCHEDULES = [linear_schedule(2), linear_schedule(5), linear_schedule(10), linear_schedule(50),
             linear_schedule(10, rescale=False)]
NAMES = ["2", "5", "10", "50", "10-unscaled"]


@pytest.fixture
def network():
    torch.manual_seed(2)
    return VectorUNet(DIM, (5, 3), 8).double()


def start(users, dtype=torch.float64):
    return keyed_normal(users, DIM, 21, dtype)


def condition_of(users):
    return keyed_normal(users, DIM, 22, torch.float64)


def keyed_noise(users, dtype=torch.float64):
    return lambda step, x: keyed_normal(users, DIM, fold_in(23, step), dtype)


def chain(network, users, condition, schedule, dtype=torch.float64, callback=None):
    """``x_0`` of some users by ancestral sampling, their noise drawn by user id."""
    def predict(x, t):
        return network(x, 1000.0 * t, condition)

    return ddpm(predict, start(users, dtype), schedule, keyed_noise(users, dtype), parametrisation="x0",
                callback=callback)


def gradient(result, network):
    """Of the mean square of the samples, all parameters in one vector, in float64."""
    network.zero_grad()
    result.square().mean().backward()
    return torch.cat([value.grad.flatten().double() for value in network.parameters()])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_chain_is_a_loop_over_posteriors(network, schedule, variance):
    """States and gradients, against ``posterior`` step by step; prediction of data and of noise."""
    users, steps = torch.arange(7), schedule.num_steps
    condition, noise = condition_of(users), keyed_noise(users)

    def predict(x, t):
        return network(x, 1000.0 * t, condition)

    x = start(users)
    for step in range(steps, 0, -1):
        mean, spread = posterior(predict(x, step / steps), x, step, schedule)
        spread = schedule.betas[step - 1] if variance == "beta" else spread
        x = mean + math.sqrt(spread) * noise(steps - step, x) if step > 1 else mean
    expected = x.detach(), gradient(x, network)
    for denoise, kind in ((predict, "x0"), (noise_from_x0(predict, schedule), "eps")):
        result = ddpm(denoise, start(users), schedule, noise, variance, kind)
        result = result.detach(), gradient(result, network)
        torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-10)


def test_gradient_is_that_of_differences(network):
    """Through all four steps, to the condition and to a weight."""
    users, schedule = torch.arange(2), linear_schedule(4)

    def run(condition, weight):
        def predict(x, t):
            return torch.func.functional_call(
                network, {"middle.weight": weight}, (x, 1000.0 * t, condition))
        return ddpm(predict, start(users), schedule, keyed_noise(users), parametrisation="x0")

    leaves = condition_of(users), network.middle.weight.detach()
    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in leaves])


def test_a_user_does_not_depend_on_the_batch(network):
    users, schedule = torch.arange(100, 140), linear_schedule(10)
    together = chain(network, users, condition_of(users), schedule)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for chosen in (order, order[:13], order[13:14]):
        some = users[chosen]
        torch.testing.assert_close(
            chain(network, some, condition_of(some), schedule), together[chosen], rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.bfloat16, 0.02)], ids=["float32", "bfloat16"])
def test_few_digits_are_enough(network, schedule, dtype, tolerance):
    """Down to alpha_bar = 1e-17. By way of predicted noise a step of beta .999 would multiply the
    rounding by 32: ten times these tolerances."""
    users, results = torch.arange(64), []
    for kind in (torch.float64, dtype):
        states, condition = {}, condition_of(users).to(kind)
        result = chain(network.to(kind), users, condition, schedule, kind, states.__setitem__)
        assert result.dtype == kind
        results.append((torch.stack([*states.values()]).detach().double(), gradient(result, network)))
    (exact, exact_gradient), (states, states_gradient) = results
    assert (states - exact).abs().max() <= tolerance * exact.abs().max()
    assert (states_gradient - exact_gradient).norm() <= tolerance * exact_gradient.norm()


def test_last_state_is_the_last_prediction(network):
    users, predictions = torch.arange(5), []

    def predict(x, t):
        predictions.append(network(x, 1000.0 * t, condition_of(users)))
        return predictions[-1]

    plan = ddpm_plan(linear_schedule(5), parametrisation="x0")
    assert plan is ddpm_plan(linear_schedule(5), parametrisation="x0")
    assert torch.equal(run_plan(plan, predict, start(users), keyed_noise(users)), predictions[-1])
    assert len(predictions) == 5


def test_another_parametrisation_is_named():
    with pytest.raises(ValueError, match=r"parametrisation='v'.*eps, x0"):
        ddpm(lambda x, t: x, torch.zeros(1, 2), linear_schedule(3), parametrisation="v")
