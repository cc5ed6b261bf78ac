"""Evaluation: rating and ranking passes over one trained model."""

from recbole_mmdiff.evaluator.dual import DualEvaluator, make_evaluator
from recbole_mmdiff.evaluator.evaluator import Evaluation, Evaluator

__all__ = ["DualEvaluator", "Evaluation", "Evaluator", "make_evaluator"]
