"""Evaluation: rating and ranking passes over one trained model."""

from recbole_mmdiff.evaluator.evaluator import Evaluation, Evaluator

__all__ = ["Evaluation", "Evaluator"]
