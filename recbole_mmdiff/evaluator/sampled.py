"""Candidates of a sampled ranking: RecBole's ``eval_args.mode`` of uniN and popN, frozen by seed."""

import torch
from torch import Tensor

from recbole_mmdiff.config import SAMPLED_MODE
from recbole_mmdiff.diffusion.noise import fold_in, keyed_uniform
from recbole_mmdiff.errors import DataError
from recbole_mmdiff.negatives import KnownItems

_ROUNDS = 100


def sampled_candidates(mode: str, positives: KnownItems, users: Tensor, known: KnownItems,
                       train_items: Tensor, seed: int) -> KnownItems:
    """The items that are ranked for each request: its positives, and N unknown ones for each.

    The same seed gives the same candidates at every evaluation, for every model.

    Args:
        mode: ``uniN`` draws uniformly, ``popN`` in proportion to the training rows of an item.
        positives: relevant items, keyed by request.
        users: (requests,) the user of each request.
        known: the items that are no negatives, keyed by user.
        train_items: (rows,) the item of every training row.
        seed: of the draws.

    Raises:
        DataError: a user knows every item.
    """
    kind, count = SAMPLED_MODE.fullmatch(mode).groups()
    request, count = positives.users, int(count)
    keys = torch.arange(len(request))
    owners = users[request]
    full = known.counts[owners] >= known.num_items - 1
    if full.any():
        raise DataError(f"eval_args.mode {mode}: {int(full.sum())} requests are of users who know "
                        f"all {known.num_items - 1} items, so there are no candidates; use full")
    drawn = known.sample_unknown(
        owners, keyed_uniform(keys, count, fold_in(seed, 0), torch.float64))
    if kind == "pop":
        drawn = _popular(drawn, owners, known, train_items, seed)
    return KnownItems(torch.cat([request, request.repeat_interleave(count)]),
                      torch.cat([positives.items, drawn.reshape(-1)]),
                      len(positives.counts), positives.num_items)


def _popular(fallback: Tensor, owners: Tensor, known: KnownItems, train_items: Tensor,
             seed: int) -> Tensor:
    """Draws by popularity, known items drawn again; ``fallback`` (n, N) where that never ends."""
    keys = torch.arange(len(owners))
    drawn, wrong = fallback.clone(), torch.ones_like(fallback, dtype=torch.bool)
    for number in range(1, _ROUNDS + 1):
        uniform = keyed_uniform(keys, fallback.shape[1], fold_in(seed, number), torch.float64)
        fresh = train_items[(uniform * len(train_items)).long()]
        fits = wrong & ~known.contains(owners[:, None].expand_as(fresh), fresh)
        drawn[fits] = fresh[fits]
        wrong &= ~fits
        if not wrong.any():
            break
    return drawn
