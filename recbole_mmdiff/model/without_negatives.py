"""What the ranking models share that learn from positive rows alone."""

from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.pairwise import PairwiseRecommender


class WithoutNegatives(PairwiseRecommender):
    """Base of ranking models whose loss draws no negative items.

    A subclass implements ``ranking_loss`` and, for the scores, ``representations``.

    Raises:
        ConfigError: ``negative_sampler`` or ``num_negatives`` asks for negatives.
    """

    draws_negatives = False

    def __init__(self, config, dataset):
        for key, unset in (("negative_sampler", None), ("num_negatives", 1)):
            if config[key] != unset:
                raise ConfigError(f"{key}: {config[key]!r} has no meaning, as {config['model']} draws no "
                                  f"negative items; leave it out")
        super().__init__(config, dataset)
