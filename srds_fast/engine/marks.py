"""When a CUDA device comes to what the host launches: events around ranges, on the stream they are in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from ..trace import Event


class Marks:
    """The events of one call. Making it and reading it wait for the device; what lies between does not.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        self._origin = self._mark()
        torch.cuda.synchronize(device)
        self._began = Event.now()

    def now(self) -> Any:
        """A mark in the current stream; None while a graph is recorded, whose events have no time."""
        return None if torch.cuda.is_current_stream_capturing() else self._mark()

    def resolved(self, pairs: Iterable[tuple[Event, Any]]) -> list[Event]:
        """The events, with the times of their marks (pairs of what `now` gave, or None) on the host's clock."""
        torch.cuda.synchronize(self._device)
        found = []
        for event, marks in pairs:
            if marks is not None and None not in marks:
                begun, ended = marks
                event = replace(event, on_device=(self._time(begun), self._time(ended)))
            found.append(event)
        return found

    def _mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _time(self, mark: Any) -> int:
        milliseconds: float = self._origin.elapsed_time(mark)
        return self._began + round(1e6 * milliseconds)
