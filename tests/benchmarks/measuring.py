"""Times and memory of functions, for benchmarks."""

import json
import statistics
import time

import numpy as np
import torch


def times_in_turn(*functions, rounds=3):
    """Medians of the seconds that each function takes, in rounds in which all take their turn."""
    for function in functions:
        function()
    times = [[] for _ in functions]
    for _ in range(rounds):
        for kept, function in zip(times, functions, strict=True):
            started = time.perf_counter()
            function()
            kept.append(time.perf_counter() - started)
    return [statistics.median(kept) for kept in times]


def peak_bytes(function, device, path):
    """The most that torch's allocator held during ``function`` beyond what it held before.

    On the CPU from the profiler's record of all allocations, scratch space inside operators included; the
    resident memory of the process would add what the allocator of the system keeps.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as record:
        function()
    record.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = np.cumsum([event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])])
    return int(held.max())
