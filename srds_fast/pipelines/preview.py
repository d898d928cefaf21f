"""Decoding beside the run: a stream of its own for what is shown while later waves still run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class PreviewStream:
    """Where refinements are made and decoded; on a CPU, nothing of its own."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def mark(self, tensor: Tensor) -> Any:
        """By the thread that computes: what is to be waited for before this tensor is read elsewhere."""
        return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    @contextmanager
    def after(self, mark: Any, tensor: Tensor) -> Iterator[None]:
        """Within it, by the thread that shows: work that reads the tensor, and does not hold up the run."""
        if mark is None:
            yield
            return
        stream = self._streams.get(tensor.device)
        if stream is None:
            stream = self._streams[tensor.device] = torch.cuda.Stream(tensor.device)
        stream.wait_event(mark)
        # its memory is not to be taken again before this has been read
        tensor.record_stream(stream)
        with torch.cuda.device(tensor.device), torch.cuda.stream(stream):
            yield
        # who goes on with what was made does so on a stream that waits for it
        torch.cuda.current_stream(tensor.device).wait_stream(stream)
