"""Negative items: plain torch, usable alone.

All samplers are vectorised, hold what is known as sorted pairs, and never draw item 0, the padding.
Randomness comes in as uniform numbers in [0, 1), so that a draw depends on what they depend on::

    import torch
    from recbole_mmdiff.diffusion import keyed_uniform
    from recbole_mmdiff.negatives import KnownItems, PopularityNegatives

    users, items = torch.tensor([0, 0, 1]), torch.tensor([1, 3, 2])
    known = KnownItems(users, items, num_users=2, num_items=6)
    uniforms = keyed_uniform(torch.arange(3), 4, seed=7, dtype=torch.float64)    # 4 for each pair
    known.sample_unknown(users, uniforms)
    counts = torch.bincount(items, minlength=6)
    PopularityNegatives(known, counts, exponent=0.75).draw(users, uniforms)
"""

from recbole_mmdiff.negatives.curricular import candidate_items, curricular_negatives
from recbole_mmdiff.negatives.hard import dynamic_negatives, mixed_negatives, real_hard_negatives
from recbole_mmdiff.negatives.known import KnownItems
from recbole_mmdiff.negatives.popularity import PopularityNegatives

__all__ = [
    "KnownItems",
    "PopularityNegatives",
    "candidate_items",
    "curricular_negatives",
    "dynamic_negatives",
    "mixed_negatives",
    "real_hard_negatives",
]
