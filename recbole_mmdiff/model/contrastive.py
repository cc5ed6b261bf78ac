"""Contrastive losses between the modalities of users and of items."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional


def modality_contrastive_loss(vectors: list[Tensor], present: list[Tensor], temperature: float) -> Tensor:
    """InfoNCE from each modality to each later one, averaged over the pairs (MMDCDR, Eq. 9).

    ``-log(exp(sim(a_i, b_i) / tau) / sum_z exp(sim(a_i, b_z) / tau))`` with the cosine ``sim``, averaged
    over the rows that have both modalities; those that lack one are in neither sum. A pair with fewer
    than two such rows has nothing to tell apart and adds 0. Always in float32: a small temperature
    would magnify what mixed precision rounds.

    Args:
        vectors: of each modality (n, d), the same n users or items.
        present: of each modality (n,) bool, who has it.
        temperature: tau.

    Returns:
        a scalar; 0 with fewer than two modalities.
    """
    losses = [vectors[0].new_zeros((), dtype=torch.float32)]
    pairs = list(itertools.combinations(range(len(vectors)), 2))
    with torch.autocast(vectors[0].device.type, enabled=False):
        normalized = [functional.normalize(part.float(), dim=-1) for part in vectors]
        for one, other in pairs:
            both = present[one] & present[other]
            if int(both.sum()) < 2:
                continue
            logits = normalized[one][both] @ normalized[other][both].T / temperature
            losses.append(functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device)))
    return torch.stack(losses).sum() / max(len(pairs), 1)
