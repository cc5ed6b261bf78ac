"""Hard negatives against loops over every row, negative and candidate."""

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_mmdiff.negatives import dynamic_negatives, mixed_negatives, real_hard_negatives

#: b, k, m
SHAPES = st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 7))


def whole(draw, shape, values=3):
    """Few different numbers, so that there are ties."""
    return torch.tensor(draw.integers(0, values, shape), dtype=torch.float32)


def loop_dynamic(scores, candidates):
    return [[candidates[row, n, max(range(scores.shape[2]), key=lambda c: scores[row, n, c])]
             for n in range(scores.shape[1])] for row in range(len(scores))]


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 2**32))
def test_dynamic_is_the_first_of_the_highest(shape, seed):
    draw = np.random.default_rng(seed)
    scores, candidates = whole(draw, shape), torch.tensor(draw.integers(1, 99, shape))
    found = dynamic_negatives(scores, candidates)
    assert found.shape == shape[:2]
    assert found.tolist() == loop_dynamic(scores.numpy(), candidates.numpy())


def loop_real_hard(scores, similarity, candidates, filtered_share, hard_share, uniforms):
    """By sorting lists; shares as the decimals they are written as."""
    result = []
    for row in range(len(scores)):
        result.append([])
        for n in range(scores.shape[1]):
            places = range(scores.shape[2])
            kept = ceil((1 - Fraction(str(filtered_share))) * len(places))
            unlike = sorted(sorted(places, key=lambda c: similarity[row, n, c])[:kept])
            hard = sorted(unlike, key=lambda c: -scores[row, n, c])
            hard = hard[:ceil(Fraction(str(hard_share)) * kept)]
            result[-1].append(candidates[row, n, hard[int(uniforms[row, n] * len(hard))]])
    return result


@settings(max_examples=120, deadline=None)
@given(SHAPES, st.sampled_from([0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]),
       st.sampled_from([0.01, 0.1, 0.3, 0.7, 1]), st.integers(0, 2**32))
def test_real_hard_is_what_sorting_gives(shape, filtered_share, hard_share, seed):
    draw = np.random.default_rng(seed)
    scores, similarity = whole(draw, shape), whole(draw, shape)
    candidates = torch.tensor(draw.integers(1, 99, shape))
    uniforms = torch.tensor(draw.random(shape[:2]))
    found = real_hard_negatives(scores, similarity, candidates, filtered_share, hard_share, uniforms)
    assert found.tolist() == loop_real_hard(scores.numpy(), similarity.numpy(), candidates.numpy(),
                                            filtered_share, hard_share, uniforms.numpy())


def test_real_hard_without_filter_and_one_hard_is_dynamic():
    draw = np.random.default_rng(0)
    scores, candidates = torch.tensor(draw.normal(size=(5, 4, 10))), torch.tensor(
        draw.integers(1, 99, (5, 4, 10)))
    found = real_hard_negatives(scores, -scores, candidates, 0, 0.1, torch.tensor(draw.random((5, 4))))
    assert torch.equal(found, dynamic_negatives(scores, candidates))


def test_real_hard_shares_are_counted_in_decimals():
    """Of 100 candidates, 0.07 are 7, which floats make 8; the last of them at the end of the interval."""
    scores = -torch.arange(100.0).view(1, 1, 100)
    candidates = torch.arange(1, 101).view(1, 1, 100)
    found = real_hard_negatives(scores, scores, candidates, 0, 0.07, torch.tensor([[1 - 2**-24]]))
    assert found.item() == 7


def loop_mixed(users, positives, candidates, uniforms):
    b, k, m, layers, _ = candidates.shape
    result = np.zeros((b, k, candidates.shape[-1]))
    for row in range(b):
        for n in range(k):
            for layer in range(layers):
                mixtures = [uniforms[row, n, c, layer] * positives[row, layer]
                            + (1 - uniforms[row, n, c, layer]) * candidates[row, n, c, layer]
                            for c in range(m)]
                result[row, n] += max(mixtures, key=lambda vector: vector @ users[row]) / layers
    return result


def vectors(b, k, m, layers, d, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, d), (b, layers, d), (b, k, m, layers, d)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return *made, torch.rand(b, k, m, layers, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4, 3, 5, 3, 6), (1, 1, 1, 1, 1), (3, 1, 16, 1, 4), (2, 4, 1, 2, 3),
                                   (0, 2, 3, 2, 4)])
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_mixed_equals_the_mixtures_made_one_by_one(shape, dtype, error):
    inputs = vectors(*shape, dtype=dtype)
    found = mixed_negatives(*inputs)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.numpy(), loop_mixed(*(x.double().numpy() for x in inputs)),
                               rtol=0, atol=error)


def test_mixed_with_alpha_0_and_1():
    users, positives, candidates, uniforms = vectors(3, 2, 4, 2, 5)
    only_positive = mixed_negatives(users, positives, candidates, torch.ones_like(uniforms))
    torch.testing.assert_close(only_positive, positives.mean(1)[:, None].expand(3, 2, 5))
    one_layer = mixed_negatives(users, positives[:, :1], candidates[:, :, :, :1],
                                torch.zeros_like(uniforms)[..., :1])
    scores = torch.einsum("bd,bkmd->bkm", users, candidates[:, :, :, 0])
    ids = torch.arange(4).expand(3, 2, 4)
    chosen = dynamic_negatives(scores, ids)[..., None, None].expand(3, 2, 1, 5)
    assert torch.equal(one_layer, candidates[:, :, :, 0].gather(2, chosen).squeeze(2))


def test_mixed_takes_one_alpha_for_all_candidates():
    users, positives, candidates, uniforms = vectors(3, 2, 4, 2, 5)
    shared = uniforms[:, :, :1]
    assert torch.equal(mixed_negatives(users, positives, candidates, shared),
                       mixed_negatives(users, positives, candidates, shared.repeat(1, 1, 4, 1)))


def test_mixed_under_autocast():
    inputs = vectors(3, 2, 4, 2, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixed_negatives(*inputs)
    assert torch.equal(found, mixed_negatives(*inputs))


def test_mixed_gradients():
    """Into the positives and the chosen candidates; none into the users, who only choose."""
    users, positives, candidates, uniforms = vectors(2, 2, 3, 2, 3)
    positives.requires_grad_()
    candidates.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p, c: mixed_negatives(users, p, c, uniforms), (positives, candidates))
    mixed_negatives(users, positives, candidates, uniforms).sum().backward()
    moved = (candidates.grad != 0).all(-1)
    assert torch.equal(moved.sum(2), torch.ones(2, 2, 2, dtype=torch.int64))
    # Each layer and negative passes alpha / L to its positive, and 1 - alpha to its candidate.
    total = positives.grad[..., 0].sum() + candidates.grad[..., 0].sum()
    torch.testing.assert_close(total, torch.tensor(2.0 * 2, dtype=torch.float64))


@pytest.mark.parametrize("call, message", [
    (lambda x: dynamic_negatives(x, x[0]), r"candidates has shape \(3, 4\); accepted: 3 dimensions"),
    (lambda x: dynamic_negatives(x[:1], x), r"scores has shape \(1, 3, 4\); accepted: \(2, 3, 4\)"),
    (lambda x: dynamic_negatives(x[..., :0], x[..., :0]), "at least one"),
    (lambda x: real_hard_negatives(x, x[:1], x, 0.1, 0.1, x[..., 0]), "similarity has shape"),
    (lambda x: real_hard_negatives(x, x, x, 0.1, 0.1, x), r"uniforms has .* accepted: \(2, 3\)"),
    (lambda x: real_hard_negatives(x, x, x, 1.0, 0.1, x[..., 0]), r"filtered_share=1.0 .* \[0, 1\)"),
    (lambda x: real_hard_negatives(x, x, x, 0.1, 0.0, x[..., 0]), r"hard_share=0.0 .* \(0, 1\]"),
    (lambda x: real_hard_negatives(x, x, x, 0.1, 1.1, x[..., 0]), "hard_share=1.1"),
    (lambda x: mixed_negatives(x, x, x, x), "candidates has shape"),
    (lambda x: mixed_negatives(x, x, x[..., None, None], x), r"users has .* accepted: \(2, 1\)"),
    (lambda x: mixed_negatives(x[:, 0, :1], x, x[..., None, None], x), "positives has shape"),
    (lambda x: mixed_negatives(x[:, 0, :1], x[:, :1, :1], x[..., None, None], x),
     r"uniforms has .* accepted: \(2, 3, 4, 1\) or \(2, 3, 1, 1\)"),
])
def test_errors_name_argument_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_same_on_the_gpu():
    draw = np.random.default_rng(1)
    scores, similarity = whole(draw, (6, 3, 20), 5), whole(draw, (6, 3, 20), 5)
    candidates, uniforms = torch.tensor(draw.integers(1, 99, (6, 3, 20))), torch.tensor(
        draw.random((6, 3)))
    assert torch.equal(
        real_hard_negatives(scores.cuda(), similarity.cuda(), candidates.cuda(), 0.2, 0.3,
                            uniforms.cuda()).cpu(),
        real_hard_negatives(scores, similarity, candidates, 0.2, 0.3, uniforms))
    inputs = vectors(4, 3, 5, 3, 6)
    torch.testing.assert_close(mixed_negatives(*(x.cuda() for x in inputs)).cpu(),
                               mixed_negatives(*inputs))
