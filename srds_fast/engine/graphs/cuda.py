"""CUDA graphs, all of a device in one pool of memory: what one leaves there the next one overwrites."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from ...errors import CaptureFailed
from .capture_checks import Guard, failed
from .recorder import Graph

T = TypeVar("T")


class CudaRecorder:
    """See `srds_fast.engine.graphs.recorder.Recorder`."""

    name = "CUDA graph"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._living: WeakSet[_CudaGraph] = WeakSet()
        self._begin_pool()

    def record(self, work: Callable[[Guard], T]) -> tuple[Graph, T]:
        """See `Recorder.record`."""
        with torch.cuda.device(self._device):
            self._take_workspace()
            graph: Any = torch.cuda.CUDAGraph()
            guard = Guard()
            found: list[T] = []
            failures: list[Exception] = []
            stream = torch.cuda.current_stream()
            try:
                with self._capture(graph):
                    try:
                        with guard:
                            found.append(work(guard))
                    except Exception as error:
                        failures.append(error)
            except Exception as error:  # a capture that broke cannot be ended without an error of its own
                failures.append(error)
                self._give_pool_up()
            finally:
                torch.cuda.set_stream(stream)  # nor does it leave its stream then
            if failures:
                try:
                    raise failures[0] if isinstance(failures[0], CaptureFailed) else failed(failures[0])
                finally:  # the error holds this frame, and the frame would hold what was recorded
                    failures.clear()
                    found.clear()
                    del graph, guard
            recorded = _CudaGraph(graph, guard)
            self._living.add(recorded)
            return recorded, found[0]

    def release(self) -> None:
        """See `Recorder.release`."""
        if not self._living:
            with torch.cuda.device(self._device):
                self._begin_pool()
                torch.cuda.empty_cache()

    def _begin_pool(self) -> None:
        with torch.cuda.device(self._device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(self._device)
            # a pool lives as long as one of its graphs: this one stays
            self._keeper = torch.cuda.CUDAGraph()
            with warnings.catch_warnings(), self._capture(self._keeper):
                warnings.simplefilter("ignore")  # it is empty

    def _give_pool_up(self) -> None:
        """The allocator would go on putting what this stream takes into a pool whose capture was not ended."""
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        self._begin_pool()

    def _take_workspace(self) -> None:
        """Have what matrix products work in there before a capture: taken in one it would be kept in the pool."""
        with torch.cuda.stream(self._stream):
            one = torch.ones(8, 8, device=self._device)
            torch.mm(one, one)

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
