"""Keyed noise: distribution, independence, and dependence on nothing but seed, key and column."""

import numpy as np
import pytest
import torch
from scipy import stats

from recbole_mmdiff.diffusion import fold_in, keyed_normal, keyed_uniform

KEYS = torch.arange(40_000)


def correlation(a, b):
    return np.corrcoef(a.numpy().ravel(), b.numpy().ravel())[0, 1]


def test_normal_distribution():
    values = keyed_normal(KEYS, 5, seed=3, dtype=torch.float64)
    assert torch.isfinite(values).all()
    assert abs(values.mean().item()) < 4 / np.sqrt(values.numel())
    assert values.var().item() == pytest.approx(1.0, abs=4 * np.sqrt(2 / values.numel()))
    for column in range(5):
        assert stats.kstest(values[:, column].numpy(), "norm").pvalue > 1e-3


def test_uniform_distribution():
    values = keyed_uniform(KEYS, 4, seed=3)
    assert values.dtype == torch.float32
    assert values.min() >= 0.0 and values.max() < 1.0
    for column in range(4):
        assert stats.kstest(values[:, column].numpy(), "uniform").pvalue > 1e-3


def test_columns_keys_and_seeds_are_independent():
    bound = 4.5 / np.sqrt(len(KEYS))
    values = keyed_normal(KEYS, 8, seed=11)
    matrix = np.corrcoef(values.numpy().T) - np.eye(8)
    squares = np.corrcoef(values.numpy().T ** 2) - np.eye(8)
    assert np.abs(matrix).max() < bound and np.abs(squares).max() < bound
    for lag in (1, 2, 64):
        assert abs(correlation(values[lag:, 0], values[:-lag, 0])) < bound
    for seed in (12, fold_in(11, 1), 11 + (1 << 32)):
        assert abs(correlation(values, keyed_normal(KEYS, 8, seed))) < bound


def test_value_depends_on_seed_key_and_column_only():
    keys = torch.tensor([5, -3, 2**62, 0, 123_456_789, 7, 7])
    whole = keyed_normal(keys, 10, seed=42)
    assert torch.equal(whole[5], whole[6])
    assert torch.equal(whole, torch.cat([keyed_normal(key[None], 10, 42) for key in keys]))
    assert torch.equal(whole.flip(0), keyed_normal(keys.flip(0), 10, 42))
    assert torch.equal(whole[:, :3], keyed_normal(keys, 3, 42))
    many = keyed_normal(KEYS, 7, 1)
    chunks = torch.cat([keyed_normal(part, 7, 1) for part in KEYS.split(777)])
    assert torch.equal(many, chunks)


def test_hash_is_splitmix64():
    """The tensor arithmetic against Python integers, with unsigned words."""
    from recbole_mmdiff.diffusion import noise

    words = [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    signed = torch.tensor([word - 2**64 if word >= 2**63 else word for word in words])
    mixed = [value % 2**64 for value in noise._mix(signed).tolist()]
    assert mixed == [noise._mix_int(word) for word in words]
    # First output of the published generator for seed 0.
    assert noise._mix_int(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_fold_in():
    seeds = {fold_in(seed, epoch, stage) for seed in range(8) for epoch in range(8) for stage in (0, 1)}
    assert len(seeds) == 128 and all(0 <= seed < 2**63 for seed in seeds)
    assert fold_in(1, 2, 3) == fold_in(1, 2, 3) != fold_in(1, 3, 2)
    assert fold_in(0) != fold_in(0, 0) != fold_in(0, 0, 0)
    assert fold_in(-1, -5) != fold_in(1, 5)


def test_edges_and_errors():
    assert keyed_normal(torch.empty(0, dtype=torch.long), 3, 0).shape == (0, 3)
    assert keyed_normal(KEYS[:2], 1, 0).shape == (2, 1)
    with pytest.raises(ValueError, match="dim=0"):
        keyed_normal(KEYS, 0, 0)
    with pytest.raises(ValueError, match="keys has shape"):
        keyed_uniform(KEYS.float(), 2, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_same_on_the_gpu():
    assert torch.equal(keyed_uniform(KEYS.cuda(), 3, 9).cpu(), keyed_uniform(KEYS, 3, 9))
    on_gpu = keyed_normal(KEYS.cuda(), 3, 9, torch.float64).cpu()
    torch.testing.assert_close(on_gpu, keyed_normal(KEYS, 3, 9, torch.float64), rtol=0, atol=1e-12)
