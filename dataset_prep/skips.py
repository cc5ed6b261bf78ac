"""What was left out, counted by reason, so that no loss is silent."""

from __future__ import annotations


class Skips:
    """Counts of what was left out, and the first place of each reason."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, reason: str, count: int = 1, where: str | None = None) -> None:
        """Count ``count`` more for ``reason``; ``where`` is remembered if it is the first place told."""
        if not count:
            return
        self._counts[reason] = self._counts.get(reason, 0) + count
        if where is not None:
            self._first.setdefault(reason, where)

    @property
    def total(self) -> int:
        """How many were left out in all."""
        return sum(self._counts.values())

    def as_dict(self) -> dict[str, dict[str, int | str | None]]:
        """Plain values for a record: reason -> ``count`` and ``first``."""
        return {reason: {"count": count, "first": self._first.get(reason)}
                for reason, count in self._counts.items()}

    def lines(self, what: str = "left out") -> list[str]:
        """One line a reason, for people; ``what`` happened to so many."""
        return [f"{what} {count:,}: {reason}" +
                (f" (first: {self._first[reason]})" if reason in self._first else "")
                for reason, count in self._counts.items()]
