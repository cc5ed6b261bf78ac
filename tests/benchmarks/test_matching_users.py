"""Matching of users by transport: WAFI against POT's sinkhorn_log, and a plan that is never stored.

2,048 users a domain, vectors of length 128 with eight directions that matter, at the paper's epsilon .1. CPU,
one thread. POT computes by numpy or torch, whichever makes three sweeps faster, gets its matrix of costs for
nothing, and makes as many sweeps as plain ones need for the same error, without looking at it. Both run in
turn.
"""

import subprocess
import sys
import time
from pathlib import Path

import ot
import pytest
import torch
from measuring import times_in_turn

from recbole_mmdiff.transport import sweeps
from recbole_mmdiff.transport.cost import user_costs
from recbole_mmdiff.transport.goum import match_users

USERS, SIZE, EPSILON, TOLERANCE = 2_048, 128, 0.1, 1e-4
#: 10.3 and 17.9, and 4.8 beside three busy processes; 5 was the aim
REQUIRED_RATIO = {torch.float64: 1.0, torch.float32: 3.5}
LARGE, LIMIT = 50_000, 2 * 2**30

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(users, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.full((SIZE,), 0.05)
    scale[:8] = 1
    return (scale * torch.randn(users, SIZE, generator=generator)).to(dtype)


def error(plan):
    """Of both marginals, the larger sum of errors, in float64."""
    plan = torch.as_tensor(plan).double()
    return max(float((plan.sum(side) - 1 / USERS).abs().sum()) for side in (0, 1))


def pot(costs, sweeps):
    masses = costs[0] * 0 + 1 / USERS
    return ot.bregman.sinkhorn_log(masses, masses, costs, EPSILON, numItermax=sweeps, stopThr=0, warn=False)


def seconds_of_pot(costs):
    started = time.perf_counter()
    pot(costs, 3)
    return time.perf_counter() - started


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)],
                         ids=str)
def test_faster_than_pot(monkeypatch, dtype):
    source, target = draw(USERS, 0, dtype), draw(USERS, 1, dtype)
    costs = user_costs(source, target, "unit").rows(slice(None))
    costs = min(costs, costs.numpy(), key=seconds_of_pot)
    plans = {}
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "WINDOW", 10**9)     # no momentum
        plain = match_users(source, target, EPSILON, tolerance=TOLERANCE)[1].iterations

    def ours():
        plans["ours"], plans["log"] = match_users(source, target, EPSILON, tolerance=TOLERANCE)

    def theirs():
        plans["pot"] = pot(costs, plain)

    seconds = times_in_turn(ours, theirs, rounds=2)
    ratio = seconds[1] / seconds[0]
    errors = error(plans["ours"].dense()), error(plans["pot"])
    print(f"\n{USERS} x {USERS}, {dtype}, ours {1000 * seconds[0]:.0f} ms, {plans['log'].iterations} sweeps; "
          f"POT by {type(costs).__module__} {1000 * seconds[1]:.0f} ms, {plain} sweeps: {ratio:.1f}x; errors "
          f"{errors[0]:.1e} / {errors[1]:.1e}")
    assert errors[0] <= 1.01 * TOLERANCE and errors[1] <= 2 * TOLERANCE
    assert ratio >= REQUIRED_RATIO[dtype]


def peak_memory():
    """Bytes of this process alone; getrusage would begin with what its parent held."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def sweep_large():
    """Prints the seconds of a matching with one sweep, and the peak memory of the whole process."""
    torch.set_num_threads(1)
    source, target = draw(LARGE, 0), draw(LARGE, 1)
    started = time.process_time()
    match_users(source, target, tolerance=10.0, max_sweeps=1)
    print(time.process_time() - started, peak_memory())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_large_plan():
    command = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); " \
              f"import test_matching_users; test_matching_users.sweep_large()"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parent.parent.parent, timeout=1200)
    assert done.returncode == 0, done.stderr
    seconds, peak = map(float, done.stdout.split())
    print(f"\n{LARGE} x {LARGE}, d = {SIZE}: {seconds:.0f} s for one sweep, its start and its check (three "
          f"passes over the plan); peak {peak / 2**20:.0f} MiB of the process; n x n is "
          f"{4 * LARGE**2 / 2**20:.0f} MiB")
    assert peak < LIMIT
