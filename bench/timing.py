"""How long a function takes on a device: on a GPU the median of graph replays, so that the host has no part in it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# of one function in a graph: replays then last long enough to be timed by events
CALLS = 10
WARM_UP = 3


def gpu_seconds(function: Callable[[], object], replays: int = 50, calls: int = CALLS, warm_up: int = WARM_UP) -> float:
    """Median of one call, captured into a CUDA graph so many times; warmed up first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream().wait_stream(stream)
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
        times.append(start.elapsed_time(stop) / 1e3 / calls)
    return statistics.median(times)


def called_seconds(
    function: Callable[[], object], device: torch.device, calls: int = 200, warm_up: int = WARM_UP
) -> float:
    """Mean of a call as a Python loop makes it, host included: the device is waited for once, at the end."""
    for _ in range(warm_up):
        function()
    with Stopwatch(device) as watch:
        for _ in range(calls):
            function()
    return watch.seconds / calls


class Stopwatch:
    """Wall-clock seconds of what is done inside, host and device: the device is waited for at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device
        self._started = 0.0

    def __enter__(self) -> Stopwatch:
        self._wait()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def copy_bandwidth(num_bytes: int = 2**28) -> float:
    """Bytes per second of a device-to-device copy, read and written ones: the ceiling of an elementwise kernel."""
    source = torch.randn(num_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu_seconds(lambda: target.copy_(source))
