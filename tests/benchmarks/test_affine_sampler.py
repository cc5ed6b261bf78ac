"""DiffCDR's sampler collapsed into one affine map against the solver itself.

Both turn 4,096 source embeddings into target embeddings in one run: the same weights, 30
evaluations, guidance in one batched forward, float32, CPU. The affine side pays for building its
map every time. Both are timed with one thread, which decides and does not depend on the
machine's cores, and with torch's default threads, which is printed.
"""

import statistics
import time

import torch

from recbole_mmdiff.diffusion import MLPDenoiser, VPSchedule, dpm_solver_plan, sample

USERS = 4096
REQUIRED_RATIO = 200.0


def diffcdr_time(t):
    return 1000.0 * max(t - 1 / 1000, 0.0)


def seconds(function, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def interleaved_medians(general, affine, rounds=5):
    """Medians in seconds, the two timed in turn so that they share the machine's moods."""
    general_times, affine_times = [], []
    for _ in range(rounds):
        general_times += seconds(general, 1)
        affine_times += seconds(affine, 40)
    return statistics.median(general_times), statistics.median(affine_times)


def test_affine_sampler_is_200_times_faster():
    torch.manual_seed(0)
    denoiser, source = MLPDenoiser(10, 10), torch.randn(USERS, 10)

    def run(method):
        plan = dpm_solver_plan(VPSchedule(), 30)
        return sample(denoiser, source, source, plan, 0.1, diffcdr_time, method)

    general, affine = run("general"), run("affine")
    assert (general - affine).abs().max() <= 1e-5 * general.abs().max()

    default, results = torch.get_num_threads(), {}
    try:
        for threads in sorted({1, default}, reverse=True):
            torch.set_num_threads(threads)
            # The machine may be busy with something else: a noisy round is measured again.
            for _ in range(3):
                slow, fast = interleaved_medians(lambda: run("general"), lambda: run("affine"))
                results[threads] = slow, fast
                if slow >= REQUIRED_RATIO * fast:
                    break
    finally:
        torch.set_num_threads(default)
    ratios = {threads: slow / fast for threads, (slow, fast) in results.items()}
    for threads, (slow, fast) in results.items():
        print(
            f"\n{threads} thread(s): general {slow * 1e3:.1f} ms, affine {fast * 1e3:.3f} ms",
            end="",
        )
        print(f", {ratios[threads]:.0f} times faster", end="")
    print()
    assert ratios[1] >= REQUIRED_RATIO
