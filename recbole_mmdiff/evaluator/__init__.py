"""Evaluation: rating and ranking passes over one trained model."""

from recbole_mmdiff.evaluator.dual import SOURCE, DualEvaluator, make_evaluator, ranks_both
from recbole_mmdiff.evaluator.evaluator import GROUPS, Evaluation, Evaluator

__all__ = ["GROUPS", "SOURCE", "DualEvaluator", "Evaluation", "Evaluator", "make_evaluator", "ranks_both"]
