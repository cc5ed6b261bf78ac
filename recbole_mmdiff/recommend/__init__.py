"""Recommendations out of a trained run."""

from recbole_mmdiff.recommend.recommender import Recommender
from recbole_mmdiff.recommend.table import Recommendations, check_output

__all__ = ["Recommendations", "Recommender", "check_output"]
