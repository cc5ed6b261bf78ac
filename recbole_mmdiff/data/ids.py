"""Which ids occur."""

import torch
from recbole.data.dataset import Dataset
from torch import Tensor


def id_mask(ids: Tensor, count: int) -> Tensor:
    """(count,) bool: which of the ids below ``count`` are among ids (n,)."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[ids[ids < count]] = True
    return mask


def ids_with_rows(dataset: Dataset, field: str) -> Tensor:
    """(ids,) bool: which users or items (``field``) stand in an interaction of a part."""
    return id_mask(dataset.inter_feat[field], dataset.num(field))
