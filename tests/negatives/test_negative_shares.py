"""Shares of numbers, and draws below them, against exact fractions."""

from fractions import Fraction
from math import ceil, floor

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_mmdiff.negatives._checks import nth_of, share_of


@given(st.decimals("0.001", 1, places=3), st.integers(0, 10**6))
def test_a_share_is_that_of_the_decimal(share, number):
    expected = ceil(Fraction(share) * number)
    assert share_of(float(share), number) == expected
    assert share_of(float(share), torch.tensor([number])).tolist() == [expected]


@given(st.integers(0, 2**24 - 1), st.integers(1, 2**28))
def test_float32_numbers_lose_nothing(uniform, number):
    uniforms = torch.tensor([uniform * 2.0**-24], dtype=torch.float32)
    expected = [floor(Fraction(uniform, 2**24) * number)]
    assert nth_of(uniforms, number).tolist() == expected
    assert nth_of(uniforms, torch.tensor([number])).tolist() == expected


@given(st.integers(1, 2**52))
def test_no_number_below_one_reaches_the_end(number):
    below_one = torch.tensor([np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert nth_of(below_one, torch.tensor([number])).item() == number - 1
