"""Previews decode on a separate CUDA stream, while later waves still run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class PreviewStream:
    """The CUDA stream on which refinements are decoded; does nothing on a CPU."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def mark(self, tensor: Tensor) -> Any:
        """Called by the computing thread: an event to wait for before another stream reads this tensor."""
        return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    @contextmanager
    def after(self, mark: Any, tensor: Tensor) -> Iterator[None]:
        """Called by the reading thread: in the block, work on the tensor runs without delaying the run."""
        if mark is None:
            yield
            return
        stream = self._streams.get(tensor.device)
        if stream is None:
            stream = self._streams[tensor.device] = torch.cuda.Stream(tensor.device)
        stream.wait_event(mark)
        # the allocator must not reuse its memory before this stream has read it
        tensor.record_stream(stream)
        with torch.cuda.device(tensor.device), torch.cuda.stream(stream):
            yield
        # later work on the results uses the current stream, so that stream must wait
        torch.cuda.current_stream(tensor.device).wait_stream(stream)
