"""The token-attention noise network against a loop over rows and tokens."""

import numpy as np
import pytest
import torch

from recbole_mmdiff.diffusion import TokenAttention, sinusoidal_embedding

ROWS, DIM = 7, 8


def network(dtype=torch.float64):
    torch.manual_seed(3)
    return TokenAttention(DIM).to(dtype)


def inputs(modalities, dtype=torch.float64):
    """x, steps, conditions, and what is present: row 0 lacks everything, row 1 the last modality."""
    draw = np.random.default_rng(modalities)
    x, conditions = draw.normal(size=(ROWS, DIM)), draw.normal(2, 3, size=(ROWS, modalities, DIM))
    present = np.ones((ROWS, modalities), dtype=bool)
    present[0] = False
    present[1, -1:] = False
    return (torch.tensor(x, dtype=dtype), torch.tensor(draw.integers(0, 20, ROWS)).to(dtype),
            torch.tensor(conditions, dtype=dtype), torch.tensor(present))


def by_hand(net, x, t, conditions, present):
    """Token by token, without those that are missing."""
    weight = net.qkv.weight.detach().numpy()
    rows = []
    for row in range(len(x)):
        tokens = [x[row].numpy(), *conditions[row][present[row]].numpy(),
                  sinusoidal_embedding(t[row:row + 1], DIM)[0].numpy()]
        normed = [(token - token.mean()) / np.sqrt(token.var() + 1e-5) for token in tokens]
        query, key, value = (np.stack([part @ token for token in normed]) for part in np.split(weight, 3))
        scores = query @ key.T / np.sqrt(DIM)
        scores = np.exp(scores - scores.max(1, keepdims=True))
        rows.append((scores / scores.sum(1, keepdims=True) @ value).mean(0))
    return np.stack(rows)


@pytest.mark.parametrize("modalities", [0, 1, 3])
def test_forward_by_hand(modalities):
    net, (x, t, conditions, present) = network(), inputs(modalities)
    found = net(x, t, conditions, present)
    np.testing.assert_allclose(found.detach().numpy(), by_hand(net, x, t, conditions, present), rtol=1e-9)


def test_a_missing_condition_is_as_good_as_none():
    """Whatever stands there, and with no gradient to it."""
    net, (x, t, conditions, present) = network(), inputs(2)
    conditions.requires_grad_()
    found = net(x, t, conditions, present)
    found.square().sum().backward()
    assert torch.equal(conditions.grad[~present], torch.zeros(int((~present).sum()), DIM).double())
    assert conditions.grad[present].abs().min(1).values.gt(0).any()
    alone = net(x[:1], t[:1], conditions[:1, :0], present[:1, :0])
    torch.testing.assert_close(found[:1], alone)


def test_prepared_conditions_and_one_time_for_all():
    net, (x, _, conditions, present) = network(), inputs(2)
    static = net.static(conditions, present)
    for step in (0, 7, 19):
        each = net(x, torch.full((ROWS,), float(step)).double(), conditions, present)
        torch.testing.assert_close(net.attend(x, step, static), each)
    assert (net.attend(x, 0, static) - net.attend(x, 19, static)).abs().max() > 1e-3


def test_gradients():
    net, (x, t, conditions, present) = network(), inputs(2)
    x.requires_grad_()
    conditions.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: net(a, t, b, present), (x, conditions), rtol=1e-4)
    net(x, t, conditions, present).sum().backward()
    assert (net.qkv.weight.grad.abs().sum(1) > 0).all()


def test_half_precision_under_autocast():
    net, (x, t, conditions, present) = network(torch.float32), inputs(2, torch.float32)
    exact = net(x, t, conditions, present)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, t, conditions, present)
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("dim", [0, 2, 7])
def test_sizes_that_are_refused(dim):
    with pytest.raises(ValueError, match="dim"):
        TokenAttention(dim)
