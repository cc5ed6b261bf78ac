"""Shares of a number, draws below it, and argument checks of this room."""

from fractions import Fraction
from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", int, Tensor)


def share_of(share: float, number: Number) -> Number:
    """``ceil(share * number)`` in whole numbers: 0.1 of 70 is 7, where floats make it 8."""
    ratio = Fraction(share).limit_denominator(10**9)
    return -(-ratio.numerator * number // ratio.denominator)


def nth_of(uniforms: Tensor, number: Number) -> Tensor:
    """``floor(uniforms * number)``; in float64, where it is below ``number`` <= 2^52 for all in [0, 1)."""
    return (uniforms.double() * number).long()


def check_share(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``1e-9 <= value <= 1`` (NaN is refused)."""
    if not 1e-9 <= value <= 1:
        raise ValueError(f"{name}={value!r} must lie in (0, 1], and be no less than 1e-9")


def check_shape(name: str, tensor: Tensor, *accepted: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor`` has one of the accepted shapes."""
    if tuple(tensor.shape) not in accepted:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; accepted: "
                         f"{' or '.join(map(str, accepted))}")


def check_rows(name: str, tensor: Tensor, rows: int, each: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` is two-dimensional with a row for each of ``rows``."""
    if tensor.dim() != 2 or len(tensor) != rows:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; accepted: ({rows}, any), a row for "
                         f"each {each}")


def check_candidates(name: str, tensor: Tensor, dims: int) -> None:
    """Raise ``ValueError`` unless ``tensor`` has ``dims`` dimensions and candidates in the third."""
    if tensor.dim() != dims or not tensor.shape[2]:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; accepted: {dims} dimensions, of which "
                         f"the third counts candidates, at least one")
