"""Counter-based random numbers: a value depends on (seed, key, column) and on nothing else.

A stream of a generator gives a sample another value when the batch order, the number of processes
or the point of a resume changes. Here each sample has a key (its row id), each epoch and purpose a
seed (``fold_in``), and the value is a hash of them: any chunking, order or split over processes
agrees.

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, Figure 15) on int64 tensors:
multiplication and addition wrap there as they do on unsigned words, and logical shifts are
arithmetic ones with the copied sign bits masked away.
"""

import math

import torch
from torch import Tensor

from recbole_mmdiff.diffusion._checks import check_count

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _mix_int(word: int) -> int:
    for shift, multiplier in _ROUNDS:
        word = ((word ^ (word >> shift)) * multiplier) & _WORD
    return word ^ (word >> _LAST_SHIFT)


def _shift_right(words: Tensor, shift: int) -> Tensor:
    return (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _mix(words: Tensor) -> Tensor:
    for shift, multiplier in _ROUNDS:
        words = _shift_right(words, shift).bitwise_xor_(words).mul_(_signed(multiplier))
    return _shift_right(words, _LAST_SHIFT).bitwise_xor_(words)


def _bits(keys: Tensor, columns: int, seed: int) -> Tensor:
    """Sixty-four random bits for each (key, column): ``(n,)`` keys to ``(n, columns)`` int64."""
    if keys.dim() != 1 or keys.dtype != torch.int64:
        raise ValueError(
            f"keys has shape {tuple(keys.shape)} and dtype {keys.dtype}; "
            "accepted: a one-dimensional int64 tensor"
        )
    start = _signed(_mix_int((int(seed) + _GOLDEN) & _WORD))
    # Mixed before the columns are added, or key k, column j would equal key k + GOLDEN, column j -
    # 1.
    rows = _mix(_mix(keys + start) + start)
    counters = torch.arange(1, columns + 1, device=keys.device) * _signed(_GOLDEN)
    return _mix(rows[:, None] + counters)


def fold_in(seed: int, *values: int) -> int:
    """Mix integers, such as (epoch, stage), into a seed.

    Returns an int in ``[0, 2^63)``, different for another order of the same values. Any integers,
    also negative ones, are accepted.
    """
    word = _mix_int((int(seed) + _GOLDEN) & _WORD)
    for value in values:
        # The product makes the two sides unlike: a plain sum would swap seed and first value.
        value_word = _mix_int((int(value) + _GOLDEN) & _WORD)
        word = _mix_int((word * _ROUNDS[0][1] + value_word) & _WORD)
    return word >> 1


def keyed_uniform(keys: Tensor, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in ``[0, 1)``, a function of (seed, key, column).

    ``keys``: LongTensor ``(n,)``; returns ``(n, dim)`` of ``dtype`` on its device. The values are
    multiples of 2^-24, exact in float32 and float64, and bit-identical on every device. Raises
    ``ValueError`` for keys of another kind or ``dim < 1``.
    """
    check_count("dim", dim)
    return (_shift_right(_bits(keys, dim, seed), 40).double() * 2.0**-24).to(dtype)


def keyed_normal(keys: Tensor, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, a function of (seed, key, column), whatever ``dim``.

    ``keys``: LongTensor ``(n,)``; returns ``(n, dim)`` of ``dtype`` on its device. Box and Muller
    1958 in float64, columns in pairs (cosine, sine), then cast: devices may differ in the last bit
    of a float64, which a cast to float32 almost never shows. Raises ``ValueError`` for keys of
    another kind or ``dim < 1``.
    """
    check_count("dim", dim)
    pairs = (dim + 1) // 2
    # Half a unit is added to 52 bits: never 0, so that the logarithm is finite, and never 1.
    uniform = (_shift_right(_bits(keys, 2 * pairs, seed), 12).double() + 0.5) * 2.0**-52
    uniform = uniform.view(-1, pairs, 2)
    radius = (-2.0 * uniform[..., 0].log()).sqrt()
    angle = 2.0 * math.pi * uniform[..., 1]
    normal = torch.stack((angle.cos().mul_(radius), angle.sin().mul_(radius)), dim=-1)
    return normal.view(-1, 2 * pairs)[:, :dim].to(dtype)
