"""Negative items: plain torch, usable alone."""

from recbole_mmdiff.negatives.known import KnownItems

__all__ = ["KnownItems"]
