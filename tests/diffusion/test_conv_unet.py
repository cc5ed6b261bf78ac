"""The convolutional U-Net against a forward written out number by number, and what it learns."""

import math

import numpy as np
import pytest
import torch

from recbole_mmdiff.diffusion import (
    ConvUNet,
    diffusion_loss,
    keyed_antithetic_steps,
    keyed_normal,
    keyed_uniform,
    linear_schedule,
    q_sample,
    sinusoidal_embedding,
)


def network(dim=16, num_conditions=2, **options):
    torch.manual_seed(5)
    return ConvUNet(dim, num_conditions, **({"channels": 2, "time_dim": 8} | options)).double()


def inputs(rows=3, dim=16, num_conditions=2):
    keys = torch.arange(rows)
    x = keyed_normal(keys, dim, 1, torch.float64)
    conditions = keyed_normal(keys, max(num_conditions, 1) * dim, 2, torch.float64)
    return x, conditions.view(rows, -1, dim) if num_conditions else None


def numbers(tensor):
    return tensor.detach().numpy()


# ---- one row by hand: maps are (c, h, w) -----------------------------------------------------------


def silu(values):
    return values / (1 + np.exp(-values))


def convolved(layer, maps):
    """A convolution whose images keep their size: zeros stand around them."""
    weight, bias = numbers(layer.weight), numbers(layer.bias)
    radius = weight.shape[2] // 2
    _, height, width = maps.shape
    result = np.zeros((len(weight), height, width))
    for out, y, x in np.ndindex(result.shape):
        total = bias[out]
        for channel, dy, dx in np.ndindex(weight.shape[1:]):
            row, column = y + dy - radius, x + dx - radius
            if 0 <= row < height and 0 <= column < width:
                total += weight[out, channel, dy, dx] * maps[channel, row, column]
        result[out, y, x] = total
    return result


def normed(layer, maps):
    result = np.zeros_like(maps)
    size = len(maps) // layer.num_groups
    for group in range(layer.num_groups):
        part = slice(group * size, (group + 1) * size)
        result[part] = (maps[part] - maps[part].mean()) / np.sqrt(maps[part].var() + layer.eps)
    return result * numbers(layer.weight)[:, None, None] + numbers(layer.bias)[:, None, None]


def affine(layer, vector):
    return numbers(layer.weight) @ vector + numbers(layer.bias)


def block(layer, maps, time, kept):
    hidden = convolved(layer.first, silu(normed(layer.first_norm, maps)))
    hidden = silu(normed(layer.second_norm, hidden + affine(layer.time_linear, time)[:, None, None]))
    shortcut = maps if isinstance(layer.shortcut, torch.nn.Identity) else convolved(layer.shortcut, maps)
    return shortcut + convolved(layer.second, hidden * np.array(kept)[:, None, None])


def halved(maps):
    height, width = maps.shape[1] // 2, maps.shape[2] // 2
    return np.stack([[[one[2 * y:2 * y + 2, 2 * x:2 * x + 2].mean() for x in range(width)]
                      for y in range(height)] for one in maps])


def by_hand(net, x, t, conditions, kept):
    side = math.isqrt(len(x))
    angles = [t * 10000.0 ** (-i / (net.time[0].in_features // 2 - 1))
              for i in range(net.time[0].in_features // 2)]
    time = silu(affine(net.time[0], np.array([*map(math.sin, angles), *map(math.cos, angles)])))
    kept = iter(np.split(np.array(kept), np.cumsum(net.block_maps)[:-1]))
    maps = convolved(net.input, np.stack([x, *conditions]).reshape(-1, side, side))
    ends = []
    for number, level in enumerate(net.down):
        maps = maps if number == 0 else halved(maps)
        for layer in level:
            maps = block(layer, maps, time, next(kept))
        ends.append(maps)
    maps = block(net.middle, maps, time, next(kept))
    for number, level in enumerate(net.up):
        maps = maps if number == 0 else maps.repeat(2, axis=1).repeat(2, axis=2)
        maps = np.concatenate([maps, ends[-1 - number]])
        for layer in level:
            maps = block(layer, maps, time, next(kept))
    return convolved(net.output, silu(maps)).reshape(-1)


@pytest.mark.parametrize(("dim", "num_conditions", "options"), [
    (16, 2, {}),
    (16, 0, {"multipliers": (2,), "num_blocks": 1}),
    (64, 1, {"channels": 4, "multipliers": (1, 3, 2), "num_blocks": 1, "dropout": 0.4}),
    (16, 3, {"channels": 3, "multipliers": (2, 1), "dropout": 0.3}),
], ids=str)
def test_equals_the_forward_by_hand(dim, num_conditions, options):
    net, (x, conditions) = network(dim, num_conditions, **options), inputs(2, dim, num_conditions)
    uniforms = keyed_uniform(torch.arange(2), net.num_maps, 3, torch.float64)
    kept = (uniforms >= net.dropout).double() / (1 - net.dropout)
    assert net.dropout == 0 or 0 < (kept == 0).sum() < kept.numel() / 2
    given = numbers(conditions) if num_conditions else np.zeros((2, 0, dim))
    rows = [by_hand(net, numbers(x)[row], t, given[row], numbers(kept)[row])
            for row, t in enumerate((3.0, 20.0))]
    times = torch.tensor([3.0, 20.0], dtype=torch.float64)
    result = net(x, times, conditions, uniforms)
    np.testing.assert_allclose(numbers(result), np.stack(rows), rtol=0, atol=1e-12)
    embedded = net(x, sinusoidal_embedding(times, 8), conditions, uniforms)
    torch.testing.assert_close(embedded, result, rtol=0, atol=1e-12)
    same_time = net(x, 20.0, conditions, uniforms)
    torch.testing.assert_close(same_time[1], result[1], rtol=0, atol=1e-12)
    assert not torch.isclose(same_time[0], result[0]).all()


def test_the_maps_of_the_levels():
    net = ConvUNet(64, 2)
    assert net.block_maps == [8, 8, 16, 16, 16, 16, 16, 8, 8]
    assert net.num_maps == 112
    sizes = [tuple(level[0].first.weight.shape[:2]) for level in net.up]
    assert sizes == [(16, 32), (8, 24)], "the way up also takes the end of the way down"
    assert net.input.in_channels == 3


# ---- what it depends on ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_conditions", [0, 1, 2, 3])
def test_gradient_reaches_every_parameter_and_input(num_conditions):
    net, (x, conditions) = network(num_conditions=num_conditions), inputs(num_conditions=num_conditions)
    given = [part.requires_grad_() for part in (x, conditions) if part is not None]
    result = net(x, torch.tensor([1.0, 2.0, 9.0]), conditions)
    assert result.shape == x.shape
    result.square().sum().backward()
    for name, value in [*net.named_parameters(), *enumerate(given)]:
        assert value.grad.isfinite().all() and value.grad.abs().max() > 1e-9, name


def test_gradients_are_those_of_differences():
    net, (x, conditions) = network(4, 1, num_blocks=1), inputs(2, 4, 1)
    names, values = zip(*net.named_parameters(), strict=True)

    def run(x, conditions, *weights):
        return torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (x, 3.0, conditions))

    leaves = [value.detach().requires_grad_() for value in (x, conditions, *values)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_time_conditions_and_nothing_else_of_other_rows_matter():
    net, (x, conditions) = network(), inputs()
    times = torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64)
    result = net(x, times, conditions)
    for row in range(3):
        alone = net(x[row:row + 1], times[row:row + 1], conditions[row:row + 1])
        torch.testing.assert_close(alone[0], result[row], rtol=0, atol=1e-12)
    for number in range(2):
        other = conditions.clone()
        other[1, number] = 0
        changed = (net(x, times, other) - result).abs().amax(1)
        assert changed[1] > 1e-3 and changed[0] == changed[2] == 0
    later = net(x, times + 1, conditions)
    assert ((later - result).abs().amax(1) > 1e-6).all()
    assert not torch.allclose(net(2 * x, times, 2 * conditions), result), "lengths are not normalised away"


def test_dropout_drops_whole_maps_of_a_row():
    net, (x, conditions) = network(dropout=0.5), inputs()
    without = net(x, 2.0, conditions)
    assert torch.equal(net(x, 2.0, conditions), without), "nothing is drawn"
    uniforms = torch.full((3, net.num_maps), 0.7, dtype=torch.float64)
    kept = net(x, 2.0, conditions, uniforms)
    uniforms[1, 3] = 0.2
    dropped = net(x, 2.0, conditions, uniforms)
    assert torch.equal(dropped[::2], kept[::2])
    assert not torch.isclose(dropped[1], kept[1]).all()
    assert torch.equal(network()(x, 2.0, conditions, uniforms), without), "a share of none"
    uniforms[:] = 0
    only_shortcuts = net(x, 2.0, conditions, uniforms)
    assert torch.equal(only_shortcuts, net(x, 9.0, conditions, uniforms)), "blocks are biases"


def test_bfloat16_where_autocast_chooses_it():
    net, (x, conditions) = network(dropout=0.2).float(), inputs()
    x, conditions, uniforms = x.float(), conditions.float(), torch.rand(3, net.num_maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = net(x, torch.tensor([1.0, 2.0, 3.0]), conditions.bfloat16(), uniforms)
    assert result.dtype == torch.bfloat16
    expected = net(x, torch.tensor([1.0, 2.0, 3.0]), conditions, uniforms)
    torch.testing.assert_close(result.float(), expected, rtol=0.1, atol=0.05)
    result.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_it_learns_from_its_conditions():
    """x_0 is a mixture of its conditions, and the noise leaves little of it to see otherwise."""
    errors = {}
    for shown in (True, False):
        torch.manual_seed(0)
        net, schedule = ConvUNet(16, 2, num_blocks=1), linear_schedule(10)
        optimiser = torch.optim.Adam(net.parameters(), lr=0.005)
        for batch in range(50):
            keys = torch.arange(64 * batch, 64 * (batch + 1))
            conditions = keyed_normal(keys, 32, 1).view(-1, 2, 16)
            x0, noise = conditions.mean(1), keyed_normal(keys, 16, 2)
            steps = keyed_antithetic_steps(keys, 10, 3)
            noised = q_sample(x0, noise, *schedule.alpha_sigma_at(steps))
            optimiser.zero_grad()
            predicted = net(noised, steps.float(), conditions if shown else torch.zeros_like(conditions))
            loss = diffusion_loss(predicted, x0, noise, "x0", "mse")
            loss.backward()
            optimiser.step()
        errors[shown] = loss.item()
    assert errors[True] < 0.1 * errors[False]
    assert errors[True] < 0.04


# ---- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"dim": 0}, "dim=0"),
    ({"dim": 32}, "dim=32 is no image of 2 levels; accepted: squares of multiples of 2, such as 256"),
    ({"dim": 25}, "dim=25 is no image of 2 levels"),
    ({"dim": 36, "multipliers": (1, 1, 1)}, "dim=36 .* multiples of 4"),
    ({"multipliers": ()}, r"multipliers=\(\) must hold at least one"),
    ({"multipliers": (1, 0)}, r"multipliers\[1\]=0"),
    ({"num_conditions": -1}, "num_conditions=-1"),
    ({"channels": 1}, "channels=1 must be an integer of at least 2"),
    ({"num_blocks": 0}, "num_blocks=0"),
    ({"time_dim": 7}, "time_dim=7"),
    ({"dropout": 1.5}, r"dropout=1\.5"),
], ids=str)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ConvUNet(**({"dim": 16, "num_conditions": 1} | options))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_same_on_the_gpu():
    net, (x, conditions) = network(dropout=0.2), inputs()
    uniforms = keyed_uniform(torch.arange(3), net.num_maps, 3, torch.float64)
    expected = net(x, 3.0, conditions, uniforms)
    result = net.cuda()(x.cuda(), 3.0, conditions.cuda(), uniforms.cuda())
    torch.testing.assert_close(result.cpu(), expected)
