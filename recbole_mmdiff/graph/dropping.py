"""Training on a part of the edges."""

import torch
from torch import Tensor

from recbole_mmdiff.errors import share as check_share


def keep_by_degree(users: Tensor, items: Tensor, num_users: int, num_items: int, share: float,
                   uniforms: Tensor) -> Tensor:
    """The edges that degree-sensitive pruning keeps: those of frequent nodes are dropped more often.

    int(e * ``share``) edges are drawn one after the other, without replacement, with weights
    1 / sqrt(d_user d_item). An edge's time -log(uniform) / weight is exponential, and the edges whose
    time comes first follow the law of ``torch.multinomial``; these depend on ``uniforms`` alone.

    Args:
        users, items: (e,) int64 ids of the edges, no pair twice.
        num_users, num_items: ids are below them.
        share: of the edges that is kept, 0 .. 1.
        uniforms: (e,) in (0, 1); 0 is accepted, and comes last.

    Returns:
        (kept,) int64 positions among the edges, in the order of the draws.

    Raises:
        ValueError: ``share`` outside of 0 .. 1, or not one uniform number an edge.

    Source: Zhou and Shen, A Tale of Two Graphs (FREEDOM), ACM MM 2023.
    """
    check_share("share", share)
    if uniforms.shape != users.shape:
        raise ValueError(f"uniforms has the shape {tuple(uniforms.shape)}; accepted: "
                         f"{tuple(users.shape)}, one an edge")
    degrees = torch.bincount(users, minlength=num_users)[users] \
        * torch.bincount(items, minlength=num_items)[items]
    times = -uniforms.double().log() * degrees.double().sqrt()
    return times.argsort(stable=True)[:int(len(users) * share)]
