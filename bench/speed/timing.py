"""How a function, or a loop, is timed on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bench.workloads.networks import DEVICE
from bench.workloads.samplers import Loop, Ran

# of one function in a graph: replays then last long enough to be timed by events
CALLS = 10
WARM_UP = 3


def gpu_seconds(function: Callable[[], object], replays: int = 50, calls: int = CALLS, warm_up: int = WARM_UP) -> float:
    """Median time of one call without the host: it is captured `calls` times into a CUDA graph, which is replayed."""
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
        times.append(float(start.elapsed_time(stop)) / 1e3 / calls)
    return statistics.median(times)


def called_seconds(
    function: Callable[[], object], device: torch.device, calls: int = 200, warm_up: int = WARM_UP
) -> float:
    """Mean time of a call from a Python loop, host included: the device is waited for once, at the end."""
    for _ in range(warm_up):
        function()
    with Stopwatch(device) as watch:
        for _ in range(calls):
            function()
    return watch.seconds / calls


class Stopwatch:
    """Wall-clock seconds of what runs inside: the device is waited for at both ends."""

    def __init__(self, device: torch.device = DEVICE) -> None:
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
    """Bytes per second, read and written, of a copy on the device: the ceiling of an elementwise kernel."""
    source = torch.randn(num_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    num_bytes = 2 * source.nbytes
    return num_bytes / gpu_seconds(lambda: target.copy_(source))


def reason(why: Exception) -> str:
    """An error in one line."""
    return f"{type(why).__name__}: {' '.join(str(why).split())[:300]}"


class Timed:
    """The calls of one loop. If one of them raises, the reason is kept and the loop is not called again.

    Args:
        make: makes the loop.

    Attributes:
        failed: why it is not called (any more), or None.
        first_calls: seconds of the two calls that warm up.
        seconds, answers, ran: of every call after these.
    """

    def __init__(self, make: Callable[[], Loop]) -> None:
        self.failed: str | None = None
        self.first_calls = 0.0
        self.seconds: list[float] = []
        self.answers: list[Tensor] = []
        self.ran: list[Ran] = []
        self._make = make
        self._loop: Loop | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def loop(self) -> Loop:
        if self._loop is None:
            self._loop = self._make()
        return self._loop

    def begin(self) -> None:
        """Two calls, which compile, plan and record."""
        self._attempt(self._begin)

    def round(self, sample: int = 0) -> None:
        """One call."""
        self._attempt(lambda: self._round(sample))

    def _attempt(self, step: Callable[[], None]) -> None:
        if self.failed is None:
            try:
                step()
            except Exception as why:  # whatever an engine, a compiler or a device raises: other loops go on
                self.failed, self._loop = reason(why), None

    def _begin(self) -> None:
        with Stopwatch() as watch:
            for _ in range(2):
                self.loop.call()
        self.first_calls = watch.seconds

    def _round(self, sample: int) -> None:
        with Stopwatch() as watch:
            answer = self.loop.call(sample)
        ran = self.loop.ran()
        self.answers.append(answer.double().cpu())
        self.ran.append(ran)
        self.seconds.append(watch.seconds)


def take_turns(loops: Iterable[Timed], rounds: int) -> None:
    """Warm all loops up, then time them in turn: what disturbs the machine disturbs all of them."""
    every = list(loops)
    for each in every:
        each.begin()
    for _ in range(rounds):
        for each in every:
            each.round()
