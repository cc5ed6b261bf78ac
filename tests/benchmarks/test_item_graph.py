"""Graphs of similar items: blocked nearest neighbours against one dense matrix, sparse against dense
normalisation.

7,050 items are those of Amazon Baby; LATTICE rebuilds its graph of 64 numbers an item in every epoch,
and 4,096 is the length of the usual image features. Float32, CPU, one thread, processor time; both ways run
in turn.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recbole_mmdiff.graph import nearest_neighbours, normalise

ITEMS, K = 7_050, 10
REBUILD_SECONDS = 1.0
REQUIRED_RATIO = 20.0
MEMORY_LIMIT = 2**29

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(n, size):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(3))


def dense_neighbours(features):
    """The plain way: columns and values (n, K) out of all n x n similarities."""
    unit = features / features.norm(dim=1, keepdim=True)
    values, columns = (unit @ unit.T).topk(K)
    return columns, values


def interleaved(functions, rounds):
    """Median seconds of each."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.process_time()
            function()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(size, rounds):
    """Median seconds of both ways, which must agree."""
    features = draw(ITEMS, size)
    columns, values = dense_neighbours(features)
    edges = nearest_neighbours(features, K)
    torch.testing.assert_close(edges.values.view(ITEMS, K), values, rtol=0, atol=1e-6)
    # The last bits of a matrix product may order two neighbours that are alike to 1e-7 otherwise.
    assert (edges.columns.view(ITEMS, K) != columns).sum() <= 10
    seconds = interleaved({"ours": lambda: nearest_neighbours(features, K),
                           "dense": lambda: dense_neighbours(features)}, rounds)
    print(f"\n{ITEMS} x {size}: dense {seconds['dense']:.2f} s, ours {seconds['ours']:.2f} s "
          f"= {seconds['dense'] / seconds['ours']:.2f}x")
    return seconds


def test_rebuild_of_lattice():
    assert compare(64, rounds=5)["ours"] < REBUILD_SECONDS


@pytest.mark.slow
def test_image_features():
    seconds = compare(4_096, rounds=3)
    assert seconds["ours"] < 2 * seconds["dense"]


def peak_memory():
    """Bytes of this process alone; getrusage would begin with what its parent held."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def build_large(n, size):
    """Prints seconds, and the peak memory before and after."""
    torch.set_num_threads(1)
    nearest_neighbours(draw(2 * K, size), K)        # What a library allocates once.
    features = draw(n, size)
    before = peak_memory()
    started = time.process_time()
    edges = nearest_neighbours(features, K)
    seconds = time.process_time() - started
    assert len(edges.values) == n * K
    print(seconds, before, peak_memory())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("n, size", [(ITEMS, 64), (ITEMS, 4_096), (10 * ITEMS, 64)])
def test_memory(n, size):
    command = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); " \
              f"import test_item_graph; test_item_graph.build_large({n}, {size})"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parent.parent.parent, timeout=1200)
    assert done.returncode == 0, done.stderr
    seconds, before, peak = map(float, done.stdout.split())
    copy, edges = 4 * n * size, 3 * 8 * n * K
    beyond = peak - before - copy - edges
    print(f"\n{n} x {size}: {seconds:.1f} s; {(peak - before) / 2**20:.0f} MiB beyond the input, of which "
          f"{beyond / 2**20:.0f} MiB are not its copy or the edges; n x n is {4 * n * n / 2**20:.0f} MiB")
    assert beyond < MEMORY_LIMIT


def test_normalisation_against_dense_products():
    n = 3_000
    edges = nearest_neighbours(draw(n, 64), K)
    table = torch.zeros(n, n)
    table[edges.rows, edges.columns] = edges.values

    def dense():
        root = torch.diag(table.sum(1).rsqrt())
        return root @ table @ root

    found = normalise(edges, n, "symmetric")
    torch.testing.assert_close(found.values, dense()[edges.rows, edges.columns])
    seconds = interleaved({"ours": lambda: normalise(edges, n, "symmetric"), "dense": dense}, 5)
    ratio = seconds["dense"] / seconds["ours"]
    print(f"\nnormalisation of {n} nodes: dense {1000 * seconds['dense']:.0f} ms, ours "
          f"{1000 * seconds['ours']:.2f} ms = {ratio:.0f}x")
    assert ratio >= REQUIRED_RATIO
