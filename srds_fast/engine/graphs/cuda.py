"""CUDA graphs. All graphs of a device share one pool of memory: each replay overwrites what others left there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from .capture_checks import CaptureCheck, failed

T = TypeVar("T")


class CudaRecorder:
    """See `srds_fast.engine.graphs.recorder.Recorder`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._living: WeakSet[_CudaGraph] = WeakSet()
        self._begin_pool()

    def record(self, work: Callable[[CaptureCheck], T]) -> tuple[_CudaGraph, CaptureCheck, T]:
        with torch.cuda.device(self._device):
            with torch.cuda.stream(self._stream):  # allocated in a capture, cuBLAS's workspace would stay in the pool
                one = torch.ones(8, 8, device=self._device)
                torch.mm(one, one)
            graph: Any = torch.cuda.CUDAGraph()
            check = CaptureCheck()
            found: list[T] = []
            failures: list[Exception] = []
            stream = torch.cuda.current_stream()
            try:
                with self._capture(graph):
                    try:
                        with check:
                            found.append(work(check))
                    except Exception as error:
                        failures.append(error)
            except Exception as error:  # ending a capture that broke raises an error of its own
                failures.append(error)
                with suppress(Exception):  # the allocator goes on using a pool whose capture was not ended
                    torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                self._begin_pool()
            finally:
                torch.cuda.set_stream(stream)  # a capture that broke stays in its stream
            if failures:
                try:
                    raise failed(failures[0])
                finally:  # the error holds this frame, which must not hold the recording
                    failures.clear()
                    found.clear()
                    del graph, check
            made = _CudaGraph(graph, check)
            self._living.add(made)
            return made, check, found[0]

    def release(self) -> None:
        if not self._living:
            with torch.cuda.device(self._device):
                self._begin_pool()
                torch.cuda.empty_cache()

    def _begin_pool(self) -> None:
        with torch.cuda.device(self._device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(self._device)
            # a pool lives as long as one of its graphs: this one is never reset
            self._keeper = torch.cuda.CUDAGraph()
            with warnings.catch_warnings(), self._capture(self._keeper):
                warnings.simplefilter("ignore")  # it is empty

    def _capture(self, graph: Any) -> Any:
        # thread_local: other threads may allocate and synchronise during the capture
        return torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")


class _CudaGraph:
    """A CUDA graph. It holds the tensors that it reads from outside, so that their memory stays theirs."""

    def __init__(self, graph: Any, check: CaptureCheck) -> None:
        self.replay = graph.replay
        self._held = check.read
