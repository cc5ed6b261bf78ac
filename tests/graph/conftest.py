"""What the tests of graphs share: dense tables of edges, and the sizes of the tensors that are made."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made inside of the block."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return made


@pytest.fixture
def largest_tensor():
    return LargestTensor()


@pytest.fixture
def table_of():
    """``table_of(edges, shape)``: the matrix of the edges as a float64 array, written one by one."""

    def table(edges, shape):
        filled = np.zeros(shape)
        for row, column, value in zip(*(part.tolist() for part in edges), strict=True):
            assert filled[row, column] == 0, "a pair stands there twice"
            filled[row, column] = value
        return filled

    return table
