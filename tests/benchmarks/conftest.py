"""What benchmarks share; how many threads they take is theirs to choose."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Tensors on one thread of the CPU, so that ratios are of work and not of the machine's other load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
