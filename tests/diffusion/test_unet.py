"""The vector U-Net against a forward written out row by row, and what it learns."""

import math

import pytest
import torch

from recbole_mmdiff.diffusion import (
    MLPDenoiser,
    VectorUNet,
    ddpm,
    diffusion_loss,
    drop_condition,
    guided_noise,
    keyed_antithetic_steps,
    keyed_normal,
    keyed_uniform,
    linear_schedule,
    q_sample,
    sinusoidal_embedding,
)

ACTIVATIONS = {
    "silu": lambda v: v / (1.0 + math.exp(-v)),
    "tanh": math.tanh,
    "relu": lambda v: max(v, 0.0),
    "none": lambda v: v,
}


def network(dim=6, **options):
    torch.manual_seed(5)
    return VectorUNet(dim, **({"hidden_sizes": (5, 3), "time_dim": 8} | options)).double()


def inputs(rows=4, dim=6):
    """State, condition and mask; the mask drops every second condition."""
    keys = torch.arange(rows)
    x, condition = (keyed_normal(keys, dim, seed, torch.float64) for seed in (1, 2))
    return x, condition, (keys % 2 == 0).double()[:, None]


def affine(layer, vector):
    """A linear layer on a list of floats."""
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [constant + sum(weight * value for weight, value in zip(row, vector, strict=True))
            for row, constant in zip(layer.weight.tolist(), bias, strict=True)]


def by_hand(net, x, t, condition, activation):
    """One row, of lists of floats; the skips are kept by level."""
    half = net.time_linear.in_features // 2
    angles = [t * 10000.0 ** (-i / (half - 1)) for i in range(half)]
    time = affine(net.time_linear, [math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    guidance, position = affine(net.condition_linear, condition), 0

    def block(layer, vector):
        nonlocal position
        result = [ACTIVATIONS[activation](own + time[position + i] + guidance[position + i])
                  for i, own in enumerate(affine(layer, vector))]
        position += len(result)
        return result

    hidden, outputs = [a + b for a, b in zip(x, condition, strict=True)], {}
    for level, layer in enumerate(net.down):
        hidden = outputs[level] = block(layer, hidden)
    hidden = block(net.middle, hidden)
    for level, layer in zip(reversed(range(len(net.down))), net.up, strict=True):
        hidden = block(layer, hidden + outputs[level])
    assert position == len(time) == len(guidance)
    return affine(net.output, hidden)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden_sizes", [(5, 3), (4,), (3, 7, 2, 9)], ids=str)
def test_equals_the_forward_by_hand(hidden_sizes, activation):
    net = network(hidden_sizes=hidden_sizes, activation=activation)
    x, condition, keep = inputs()
    times = torch.tensor([1.0, 40.0, 333.3, 999.0], dtype=torch.float64)
    kept = (keep * condition).tolist()
    rows = [by_hand(net, *row, activation) for row in zip(x.tolist(), times.tolist(), kept, strict=True)]
    expected = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(net(x, times, condition, keep), expected, rtol=0, atol=1e-12)
    embedded = sinusoidal_embedding(times, 8)
    torch.testing.assert_close(net(x, embedded, condition, keep), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(net(x, 40.0, condition, keep)[1], expected[1], rtol=0, atol=1e-12)


def test_widths_are_the_published_ones():
    """32-16-8-16-32, with 8 + 8 and 16 + 16 coming together on the way up."""
    net = VectorUNet(32)
    shapes = [tuple(layer.weight.shape) for layer in (*net.down, net.middle, *net.up, net.output)]
    assert shapes == [(16, 32), (8, 16), (8, 8), (16, 16), (32, 32), (32, 32)]
    assert net(torch.zeros(3, 32), 1.0).shape == (3, 32)


@pytest.mark.parametrize("t", [7.0, torch.tensor([1.0, 2.0, 3.0, 4.0]).double()], ids=["float", "rows"])
def test_no_condition_is_a_condition_of_zeros(t):
    net, (x, condition, keep) = network(), inputs()
    without = net(x, t)
    assert torch.equal(without, net(x, t, torch.zeros_like(x)))
    assert torch.equal(without, net(x, t, condition, torch.zeros_like(keep)))
    assert torch.equal(net(x, t, condition), net(x, t, condition, torch.ones_like(keep)))
    mixed, with_condition = net(x, t, condition, keep), net(x, t, condition)
    assert torch.equal(mixed[1::2], without[1::2]) and torch.equal(mixed[::2], with_condition[::2])
    assert not torch.isclose(with_condition, without).any()


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_takes_it_as_its_network(scale):
    net, (x, condition, _) = network(), inputs()
    result = guided_noise(net, condition, scale, lambda t: 1000.0 * t)(x, 0.3)
    without, with_condition = net(x, 300.0), net(x, 300.0, condition)
    torch.testing.assert_close(result, without + scale * (with_condition - without))


@pytest.mark.parametrize("hidden_sizes", [(5, 3), (4,), (3, 7, 2, 9)], ids=str)
def test_gradient_reaches_every_parameter(hidden_sizes):
    net, (x, condition, keep) = network(hidden_sizes=hidden_sizes), inputs()
    net(x, 30.0, condition, keep).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).all(), name


def test_gradients_are_those_of_differences():
    net, (x, condition, keep) = network(3, hidden_sizes=(2,), time_dim=4), inputs(2, 3)
    names, values = zip(*net.named_parameters(), strict=True)

    def run(x, t, condition, *weights):
        return torch.func.functional_call(
            net, dict(zip(names, weights, strict=True)), (x, t, condition, keep))

    t = torch.tensor([2.0, 5.0], dtype=torch.float64)
    leaves = [value.detach().requires_grad_() for value in (x, t, condition, *values)]
    assert torch.autograd.gradcheck(run, leaves)


def test_dropout_acts_in_training_only():
    net, (x, condition, _) = network(dropout=0.5), inputs()
    twice = [net(x, 3.0, condition) for _ in range(2)]
    assert not torch.equal(*twice)
    net.eval()
    assert torch.equal(net(x, 3.0, condition), network()(x, 3.0, condition))
    nothing_left = network(dropout=1.0)
    assert torch.equal(nothing_left(x, 3.0, condition), nothing_left.output.bias.expand_as(x))


def test_bfloat16_where_autocast_chooses_it():
    net, x = network().float(), inputs()[0].float()
    condition, reference = x.flip(0), MLPDenoiser(6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = net(x, 20.0, condition)
        assert result.dtype == reference(x, 20.0, condition).dtype == torch.bfloat16
        assert net(x, torch.arange(4), condition).dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), net(x, 20.0, condition), rtol=0.05, atol=0.02)
    result.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.fixture
def compiler():
    """A fresh state of the compiler before and after; its warning of cached functions is expected."""
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", [VectorUNet, MLPDenoiser])
def test_one_graph_for_all_times(compiler, kind):
    """A float time must not be compiled as a constant: the compiler gives up after eight of them."""
    torch.manual_seed(0)
    net = VectorUNet(6) if kind is VectorUNet else MLPDenoiser(6, 6)
    x, condition, keep = (value.float() for value in inputs())
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = compiler(net, backend=count, fullgraph=True)
    for t in range(12):
        assert torch.equal(compiled(x, 37.1 * t, condition, keep), net(x, 37.1 * t, condition, keep))
    assert len(graphs) <= 3
    times = torch.linspace(1, 999, 4)
    assert torch.equal(compiled(x, times, condition), net(x, times, condition))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_equals_eager(compiler):
    try:
        compiler(torch.sin)(torch.ones(2))
    except Exception as error:
        pytest.skip(f"nothing can be compiled here: {error}")
    net, (x, condition, keep) = network().float(), (value.float() for value in inputs())
    compiled, results = compiler(net, fullgraph=True), []
    for run in (net, compiled):
        net.zero_grad()
        output = run(x, torch.linspace(1, 999, 4), condition, keep)
        output.square().sum().backward()
        results.append([output.detach(), *(parameter.grad.clone() for parameter in net.parameters())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def trained():
    """A network that learned ``x_0 = A c + .3 noise``, three rows in ten without their condition."""
    torch.manual_seed(0)
    schedule, net = linear_schedule(10), VectorUNet(32)
    matrix, batches = torch.linalg.qr(torch.randn(32, 32)).Q, 800
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, batches)
    for batch in range(batches):
        keys = torch.arange(256 * batch, 256 * (batch + 1))
        condition, spread, noise = (keyed_normal(keys, 32, seed) for seed in (1, 2, 3))
        x0, steps = condition @ matrix + 0.3 * spread, keyed_antithetic_steps(keys, 10, 4)
        x_t = q_sample(x0, noise, *schedule.alpha_sigma_at(steps))
        keep = drop_condition(keyed_uniform(keys, 1, 5), 0.3)
        optimiser.zero_grad()
        diffusion_loss(net(x_t, 100.0 * steps, condition, keep), x0, noise, "x0", "mse").backward()
        optimiser.step()
        rate.step()
    return net.eval(), schedule, matrix


@torch.no_grad()
def test_learns_a_conditional_mean(trained):
    """Means of 200 ancestral samples a condition, against ``A c`` and, without one, against 0."""
    net, schedule, matrix = trained
    keys, truth = torch.arange(40 * 200), keyed_normal(torch.arange(40), 32, 11) @ matrix
    condition = (truth @ matrix.T).repeat_interleave(200, dim=0)

    def means(given):
        samples = ddpm(lambda x, t: net(x, 1000.0 * t, given), keyed_normal(keys, 32, 12), schedule,
                       lambda step, x: keyed_normal(keys, 32, 13 + step), parametrisation="x0")
        return samples.view(40, 200, 32).mean(1)

    def size(error):
        return error.square().mean().sqrt().item()

    unconditional = means(None)
    assert size(means(condition) - truth) < 0.15
    assert size(unconditional) < 0.15 and size(unconditional - truth) > 0.9


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dim": 0}, "dim=0"),
        ({"hidden_sizes": ()}, r"hidden_sizes=\(\).*at least one"),
        ({"hidden_sizes": (8, 0)}, r"hidden_sizes\[1\]=0"),
        ({"time_dim": 7}, "time_dim=7"),
        ({"time_dim": 2}, "time_dim=2"),
        ({"activation": "swish"}, "activation='swish'.*silu"),
        ({"dropout": 1.5}, r"dropout=1\.5"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        VectorUNet(**({"dim": 4} | options))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_same_on_the_gpu():
    net, (x, condition, keep) = network(), inputs()
    expected = net(x, 3.0, condition, keep)
    result = net.cuda()(x.cuda(), 3.0, condition.cuda(), keep.cuda())
    torch.testing.assert_close(result.cpu(), expected)
