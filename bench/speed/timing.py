"""How a function, or a loop, is timed on a device."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer

from bench.workloads.networks import DEVICE, SMALL

Result = TypeVar("Result")


def device_seconds(function: Callable[[], object], replays: int = 50, calls: int = 10, warm_up: int = 3) -> float:
    """Median time of one call without the host: it is captured `calls` times into a CUDA graph, which is replayed.

    On a CPU, where nothing can be replayed, the mean time of three calls.
    """
    if SMALL:
        return called_seconds(function, 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)) / 1e3 / calls)
    return statistics.median(times)


def called_seconds(function: Callable[[], object], calls: int) -> float:
    """Mean time of a call from a Python loop, host included: the device is waited for once, at the end."""
    seconds: float = Timer("function()", globals={"function": function}).timeit(calls).mean
    return seconds


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """Wall-clock seconds of a call, and what it returns. The device is waited for before and after it."""
    started = timer()
    found = function()
    return timer() - started, found


def copy_bandwidth(num_bytes: int = 2**28) -> float:
    """Bytes per second, read and written, of a copy on the device: the ceiling of an elementwise kernel."""
    source = torch.randn(num_bytes // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_seconds(lambda: target.copy_(source))


def reason(why: Exception) -> str:
    """An error in one line."""
    return f"{type(why).__name__}: {' '.join(str(why).split())[:300]}"
