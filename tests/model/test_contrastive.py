"""The contrastive loss between modalities (MMDCDR, Eq. 9) against loops over pairs and rows."""

import itertools

import numpy as np
import pytest
import torch
from running import slope

from recbole_mmdiff.model.contrastive import modality_contrastive_loss

EVERYBODY = 1.1


def drawn(modalities, rows, share=EVERYBODY, dim=3, seed=2):
    """Vectors (rows, dim) of each modality in float64, and who has them."""
    draw = np.random.default_rng(seed)
    vectors = [torch.from_numpy(draw.normal(size=(rows, dim))) for _ in range(modalities)]
    return vectors, [torch.from_numpy(draw.random(rows) < share) for _ in range(modalities)]


def cosine(one, other):
    lengths = np.linalg.norm(one) * np.linalg.norm(other)
    return one @ other / lengths if lengths else 0.0


def by_loops(vectors, present, temperature):
    """The mean over pairs of modalities; each is the mean over the rows that have both."""
    vectors = [part.detach().double().numpy() for part in vectors]
    of_pairs = []
    for a, b in itertools.combinations(range(len(vectors)), 2):
        rows = [i for i in range(len(vectors[a])) if present[a][i] and present[b][i]]
        losses = []
        for i in rows:
            similar = np.array([cosine(vectors[a][i], vectors[b][z]) for z in rows]) / temperature
            losses.append(np.log(np.exp(similar).sum()) - similar[rows.index(i)])
        of_pairs.append(np.mean(losses) if losses else 0.0)
    return np.mean(of_pairs) if of_pairs else 0.0


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [0, 1, 2, 9])
@pytest.mark.parametrize("share", [EVERYBODY, 0.6, 0.0])
def test_value_by_loops(modalities, rows, share):
    given = drawn(modalities, rows, share)
    for temperature in (0.05, 0.5):
        loss = modality_contrastive_loss(*given, temperature)
        assert loss.shape == () and loss.dtype == torch.float32
        assert loss.item() == pytest.approx(by_loops(*given, temperature), rel=1e-5, abs=1e-6)


def test_rows_that_lack_a_modality_are_in_neither_sum():
    """Their vectors may be anything, and get no gradient."""
    vectors, present = drawn(3, 12, 0.6)
    assert all(0 < both.sum() < 12 for both in present)
    before = modality_contrastive_loss(vectors, present, 0.2)
    other = [torch.where(has[:, None], part, 7.0).requires_grad_()
             for part, has in zip(vectors, present, strict=True)]
    after = modality_contrastive_loss(other, present, 0.2)
    assert torch.equal(after, before)
    after.backward()
    for part, has in zip(other, present, strict=True):
        assert part.grad[has].any() and not part.grad[~has].any()


def test_it_looks_from_the_earlier_to_the_later_modality():
    """Eq. 9 has texts above and all images below: not the same the other way round."""
    vectors, present = drawn(2, 6)
    there, back = (modality_contrastive_loss(vectors[::step], present, 0.1) for step in (1, -1))
    assert there.item() != pytest.approx(back.item(), rel=0.01)
    assert there.item() == pytest.approx(by_loops(vectors, present, 0.1), rel=1e-5)


def test_it_falls_where_modalities_agree():
    vectors, present = drawn(2, 8, dim=16)
    apart = modality_contrastive_loss(vectors, present, 0.1)
    alike = modality_contrastive_loss([vectors[0], 3 * vectors[0]], present, 0.1)
    assert alike < 0.1 * apart


def test_gradient_against_finite_differences():
    vectors, present = drawn(3, 5, 0.8)
    vectors = [part.requires_grad_() for part in vectors]
    modality_contrastive_loss(vectors, present, 0.3).backward()
    for part in vectors:
        for place in itertools.product(range(5), range(3)):
            with torch.no_grad():
                expected = slope(lambda: by_loops(vectors, present, 0.3), part, place)
            assert part.grad[place].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_gradient_of_what_has_no_direction(rows):
    """Nothing to compare, or vectors of zero: a gradient without NaN, so that training goes on."""
    vectors = [torch.zeros(rows, 4, requires_grad=True) for _ in range(2)]
    present = [torch.ones(rows, dtype=torch.bool)] * 2
    loss = modality_contrastive_loss(vectors, present, 0.02) + sum(part.sum() for part in vectors)
    loss.backward()
    assert all(torch.isfinite(part.grad).all() for part in vectors)
    assert loss.item() == pytest.approx(np.log(max(rows, 1)), abs=1e-6)


def test_half_precision_is_that_of_the_vectors_alone():
    """Divided by a small temperature, rounded similarities would be far off."""
    vectors, present = drawn(2, 40, dim=32)
    vectors[1] += 0.3 * vectors[0]
    exact = by_loops(vectors, present, 0.02)
    with torch.autocast("cpu"):
        single = modality_contrastive_loss([part.float() for part in vectors], present, 0.02)
        rounded = modality_contrastive_loss([part.bfloat16() for part in vectors], present, 0.02)
    assert single.item() == pytest.approx(exact, rel=1e-5)
    expected = by_loops([part.bfloat16() for part in vectors], present, 0.02)
    assert rounded.item() == pytest.approx(expected, rel=1e-5)
