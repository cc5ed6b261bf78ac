"""Hard negatives: chosen by the model among candidates that were drawn before.

What a user knows is left out when the candidates are drawn: ``KnownItems.sample_unknown``.
"""

import torch
from torch import Tensor

from recbole_mmdiff.negatives._checks import (
    check_candidates,
    check_shape,
    check_share,
    nth_of,
    share_of,
)


def dynamic_negatives(scores: Tensor, candidates: Tensor) -> Tensor:
    """Of the candidates of each negative, the one with the highest score.

    Source: dynamic negative sampling (Zhang et al., SIGIR 2013).

    Args:
        scores: (b, k, m) of the model, for the candidates.
        candidates: (b, k, m) int64 item ids.

    Returns:
        (b, k) int64 item ids; of equal scores the first.

    Raises:
        ValueError: the shapes differ, or there are no candidates.
    """
    check_candidates("candidates", candidates, 3)
    check_shape("scores", scores, tuple(candidates.shape))
    return candidates.gather(2, scores.argmax(2, keepdim=True)).squeeze(2)


def mixed_negatives(users: Tensor, positives: Tensor, candidates: Tensor, uniforms: Tensor) -> Tensor:
    """Negative vectors mixed out of the positive's and, in each layer, the hardest candidate's.

    Positive mixing makes ``alpha * positive + (1 - alpha) * candidate`` in each layer; hop mixing takes,
    in each layer, the mixture with the largest inner product with the user, and pools the layers by
    their mean, as LightGCN does. Gradients flow into positives and candidates through the mixtures that
    are taken; users only choose.

    Source: MixGCF (Huang et al., KDD 2021), sections 3.1 and 3.2.

    Args:
        users: (b, d) pooled user vectors.
        positives: (b, L, d) the positive item in each layer.
        candidates: (b, k, m, L, d) the candidates of each negative in each layer.
        uniforms: (b, k, m, L) the alphas, in [0, 1); (b, k, 1, L) gives all candidates of a negative the
            same, as the authors' code does.

    Returns:
        (b, k, d) negative vectors.

    Raises:
        ValueError: shapes that do not fit together, or no candidates.
    """
    check_candidates("candidates", candidates, 5)
    b, k, m, layers, d = candidates.shape
    check_shape("users", users, (b, d))
    check_shape("positives", positives, (b, layers, d))
    check_shape("uniforms", uniforms, (b, k, m, layers), (b, k, 1, layers))
    alpha = uniforms.to(candidates.dtype).expand(b, k, m, layers)
    with torch.no_grad(), torch.autocast(candidates.device.type, enabled=False):
        # The product is linear in the mixture, so the m mixtures are never made.
        of_positive = torch.einsum("bd,bld->bl", users, positives)[:, None, None]
        of_candidates = torch.einsum("bd,bkmld->bkml", users, candidates)
        hardest = torch.lerp(of_candidates, of_positive.expand_as(alpha), alpha).argmax(2, keepdim=True)
    hard = candidates.gather(2, hardest[..., None].expand(-1, -1, -1, -1, d)).squeeze(2)
    alpha = alpha.gather(2, hardest).squeeze(2)[..., None]
    return torch.lerp(hard, positives[:, None].expand_as(hard), alpha.expand_as(hard)).mean(2)


def real_hard_negatives(scores: Tensor, similarity: Tensor, candidates: Tensor, filtered_share: float,
                        hard_share: float, uniforms: Tensor) -> Tensor:
    """A hard candidate that does not look like the positive item.

    Of m candidates those most similar to the positive, likely false negatives, are left out, so that
    ``ceil((1 - filtered_share) * m)`` are kept. One of the ``ceil(hard_share * kept)`` with the highest
    scores among them is taken.

    Source: the part of RealHNS (Ma et al., RecSys 2023) that needs one domain only: hard negatives and
    the item-based filter of false ones. Absent are the selector of hard negatives across domains, its
    user-based filter, and the curriculum: both shares are constants here, and a schedule of them is the
    caller's.

    Args:
        scores: (b, k, m) of the model, for the candidates.
        similarity: (b, k, m) of the candidates' item vectors with the positive's.
        candidates: (b, k, m) int64 item ids.
        filtered_share: of the candidates, in [0, 1).
        hard_share: of those kept, in (0, 1].
        uniforms: (b, k) in [0, 1).

    Returns:
        (b, k) int64 item ids. Of equal similarities the first candidate is kept, of equal scores the
        first is the higher.

    Raises:
        ValueError: the shapes differ, there are no candidates, or a share is out of range.
    """
    check_candidates("candidates", candidates, 3)
    for name, tensor in (("scores", scores), ("similarity", similarity)):
        check_shape(name, tensor, tuple(candidates.shape))
    check_shape("uniforms", uniforms, tuple(candidates.shape[:2]))
    check_share("hard_share", hard_share)
    if not 0 <= filtered_share < 1:
        raise ValueError(f"filtered_share={filtered_share!r} must lie in [0, 1)")
    kept = max(1, share_of(1 - filtered_share, candidates.shape[2]))
    hard = share_of(hard_share, kept)
    unlike = similarity.argsort(dim=2, stable=True)[..., :kept]
    # Back in the order of the candidates, so that the first of equal scores is the first of them.
    unlike = unlike.sort(dim=2).values
    by_score = scores.gather(2, unlike).argsort(dim=2, descending=True, stable=True)
    nth = nth_of(uniforms, hard)[..., None]
    return candidates.gather(2, unlike.gather(2, by_score.gather(2, nth))).squeeze(2)
