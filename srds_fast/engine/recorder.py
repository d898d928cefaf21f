"""What records and replays: CUDA graphs, or on the CPU a tape of operations.

One device replays for one call at a time. Its graphs share one pool of memory, and what one leaves in it the next one
overwrites.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol, TypeVar

import torch

from ..errors import CaptureFailed
from .guard import Guard, failed
from .tape import TapeRecorder

T = TypeVar("T")


class Graph(Protocol):
    """A recorded stretch."""

    def replay(self) -> None:
        """Do it again: one launch."""

    def reset(self) -> None:
        """Give its memory back."""


class Recorder(Protocol):
    """Records stretches on one device.

    Attributes:
        name: of its kind, for reports.
    """

    name: str

    def record(self, work: Callable[[Guard], T]) -> tuple[Graph, T]:
        """Run `work` once in Python, given the guard that watches it. What it does is not done until the first replay.

        Tensors that work returns or keeps are those that replays write to.

        Raises:
            CaptureFailed: an operation cannot be repeated; nothing has been changed.
        """


class CudaRecorder:
    """Records CUDA graphs. Their memory comes from one pool a device."""

    name = "CUDA graph"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)
            # a pool lives as long as one of its graphs: this one stays
            self._keeper = torch.cuda.CUDAGraph()
            with warnings.catch_warnings(), self._capture(self._keeper):
                warnings.simplefilter("ignore")  # it is empty

    def record(self, work: Callable[[Guard], T]) -> tuple[Graph, T]:
        """See `Recorder.record`."""
        graph: Any = torch.cuda.CUDAGraph()
        failure: Exception | None = None
        found: list[T] = []
        guard = Guard()
        stream = torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.device(self._device), self._capture(graph):
                try:
                    with guard:
                        found.append(work(guard))
                except Exception as error:
                    failure = error
        except Exception as error:  # a capture that broke cannot be ended without an error of its own
            failure = failure or error
            torch.cuda.set_stream(stream)  # nor does it leave its stream then
        finally:
            # what matrix products work in was taken from the pool, and would be kept
            torch._C._cuda_clearCublasWorkspaces()
        if failure is not None:
            if isinstance(failure, CaptureFailed):
                raise failure
            raise failed(failure) from failure
        return _CudaGraph(graph, guard), found[0]

    def _capture(self, graph: Any) -> Any:
        # other threads may allocate and wait while this one captures
        return torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")


class _CudaGraph:
    """A CUDA graph, and what it reads from outside."""

    def __init__(self, graph: Any, guard: Guard) -> None:
        self.replay = graph.replay
        self._graph = graph
        self._held = guard.read

    def reset(self) -> None:
        """Give its memory back."""
        self._graph.reset()
        self._held.clear()


@cache
def recorder(device: torch.device) -> Recorder:
    """The recorder of a device; device: with its index."""
    return CudaRecorder(device) if device.type == "cuda" else TapeRecorder()


class _Turn:
    """Whose turn it is on a device."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.done: Any = None


@cache
def _turn_of(device: torch.device) -> _Turn:
    return _Turn()


@contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """Have the graphs of a device to oneself: until the host has done, and until the device has."""
    mine = _turn_of(device)
    with mine.lock:
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if mine.done is not None:
            stream.wait_event(mine.done)
        try:
            yield
        finally:
            mine.done = stream.record_event()
