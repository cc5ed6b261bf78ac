"""Argument checks of this room: a message names the parameter, its value and what is accepted."""

from collections.abc import Collection


def check_choice(name: str, value: object, accepted: Collection[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``accepted``."""
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is not known; accepted: {', '.join(accepted)}")


def check_count(name: str, value: object, minimum: int = 1) -> None:
    """Raise ``ValueError`` unless ``value`` is an ``int`` of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value!r} must be an integer of at least {minimum}")


def check_interval(name: str, value: float, low: float, high: float) -> None:
    """Raise ``ValueError`` unless ``low <= value <= high`` (NaN is refused)."""
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r} must lie in [{low}, {high}]")


def check_order(order: object) -> None:
    """Raise ``ValueError`` unless ``order`` is 1, 2 or 3."""
    if order not in (1, 2, 3):
        raise ValueError(f"order={order!r} is not known; accepted: 1, 2, 3")
