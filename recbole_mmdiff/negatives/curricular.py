"""CCDRec's curricular negatives: unknown items that resemble the positive in a pool of vectors."""

import math

import torch
from torch import Tensor

from recbole_mmdiff.diffusion.noise import keyed_uniform
from recbole_mmdiff.negatives._checks import check_rows, check_shape, check_share, nth_of, share_of
from recbole_mmdiff.negatives.known import KnownItems


def candidate_items(num_items: int, share: float, seed: int, device: torch.device) -> Tensor:
    """A random share of the items, the same for all rows of a batch.

    Args:
        num_items: item ids are below it; 0 is padding.
        share: of the items, in (0, 1].
        seed: the draw depends on it alone, on every device.
        device: of the result.

    Returns:
        (c,) int64 distinct items without padding, ``c = ceil(share * (num_items - 1))``.

    Raises:
        ValueError: there are no items, or ``share`` is out of range.
    """
    check_share("share", share)
    if num_items < 2:
        raise ValueError(f"num_items={num_items!r} must be at least 2: item 0 is padding")
    items = torch.arange(1, num_items, device=device)
    order = keyed_uniform(items, 1, seed).squeeze(1).argsort(stable=True)
    return items[order[:share_of(share, num_items - 1)]]


@torch.no_grad()
def curricular_negatives(pool: Tensor, known: KnownItems, users: Tensor, positives: Tensor,
                         candidates: Tensor, share: float, uniforms: Tensor,
                         block_elements: int = 2**22) -> Tensor:
    """Random ones of the candidates most similar to the positive item, by vectors of a pool.

    Similarity is the inner product of vectors of the pool, in float32 or better. Left out are padding,
    the positive and what the user knows; of the n candidates that are left, one of the
    ``ceil(share * n)`` most similar is drawn for each uniform number. Where none is left, it is a
    uniform unknown item.

    Source: CCDRec, section "Curricular Negative Sampler". Which pool belongs to an epoch (Eq. 7) is the
    caller's.

    Args:
        pool: (num_items, d) item vectors, such as those of a step of the reverse process.
        known: the users' known items.
        users, positives: (b,) int64 rows of the batch.
        candidates: (c,) int64 items that the rows share; one that stands there twice counts once.
        share: of the candidates left, in (0, 1].
        uniforms: (b, k) in [0, 1).
        block_elements: so many similarities are held at a time (at least those of one row). The result
            does not depend on it, but for a last bit of a similarity.

    Returns:
        (b, k) int64 item ids. Which of equal similarities is the higher is fixed on a device.

    Raises:
        ValueError: shapes that do not fit together, a share out of range, or a user who knows every
            item.
    """
    check_share("share", share)
    check_rows("pool", pool, known.num_items, "item")
    check_shape("positives", positives, tuple(users.shape))
    check_rows("uniforms", uniforms, len(users), "user")
    if block_elements < 1:
        raise ValueError(f"block_elements={block_elements!r} must be at least 1")
    candidates = torch.unique(candidates)
    candidates = candidates[candidates > 0]
    if not len(candidates):
        return known.sample_unknown(users, uniforms)
    # Items that are no candidates share one more column, which is cut off.
    column = torch.full((known.num_items,), len(candidates), device=candidates.device)
    column[candidates] = torch.arange(len(candidates), device=candidates.device)
    vectors = pool[candidates].to(torch.promote_types(pool.dtype, torch.float32))
    drawn = torch.empty(uniforms.shape, dtype=torch.int64, device=uniforms.device)
    left = torch.empty_like(users)
    rows = max(1, block_elements // len(candidates))
    for start in range(0, len(users), rows):
        block = slice(start, start + rows)
        with torch.autocast(pool.device.type, enabled=False):
            similarity = pool[positives[block]].to(vectors.dtype) @ vectors.T
        left_out = _left_out(known, users[block], positives[block], column, len(candidates))
        place, left[block] = _draw_similar(similarity, left_out, share, uniforms[block])
        drawn[block] = candidates[place]
    empty = left == 0
    if empty.any():
        drawn[empty] = known.sample_unknown(users[empty], uniforms[empty])
    return drawn


def _left_out(known: KnownItems, users: Tensor, positives: Tensor, column: Tensor, width: int) -> Tensor:
    """(b, width) bool: the positive and the user's known items; ``column`` (num_items,) is ``width`` for
    what is no candidate."""
    mask = torch.zeros(len(users), width + 1, dtype=torch.bool, device=users.device)
    row, items = known.rows(users)
    mask[row, column[items]] = True
    mask[torch.arange(len(users), device=users.device), column[positives]] = True
    return mask[:, :width]


def _draw_similar(similarity: Tensor, left_out: Tensor, share: float, uniforms: Tensor
                  ) -> tuple[Tensor, Tensor]:
    """Columns (b, k) among each row's largest, and the number of columns left (b,)."""
    width = similarity.shape[1]
    left = width - left_out.sum(1)
    # As many for each row as a full row needs: one call, and the same one for any block.
    most = share_of(share, width)
    similar = similarity.masked_fill_(left_out, -math.inf).topk(most, dim=1).indices
    nth = nth_of(uniforms, share_of(share, left)[:, None])
    return similar.gather(1, nth), left
