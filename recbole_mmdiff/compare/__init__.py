"""Comparisons: many runs on the same splits with the same budget, and the store that keeps them."""

from recbole_mmdiff.compare.runner import compare

__all__ = ["compare"]
