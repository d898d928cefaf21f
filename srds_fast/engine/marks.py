"""When a CUDA device comes to what the host launches: events around ranges, on the stream they are in."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..trace import Event

logger = logging.getLogger("srds_fast")


class Mark(NamedTuple):
    """A moment on a stream.

    Attributes:
        event: that tells its time.
        stream: its number.
    """

    event: Any
    stream: int


class Marks:
    """The events of one call. Making it and reading it wait for its stream; what lies between does not.

    A device that has failed tells no time, which the log says: the error itself is the call's to raise.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._origin = self.now()
        if self._origin is not None:
            self._origin.event.synchronize()
        self._began = Event.now()

    def now(self) -> Mark | None:
        """A mark in the current stream; None while a graph is recorded, whose events have no time."""
        try:
            if torch.cuda.is_current_stream_capturing():
                return None
            stream = torch.cuda.current_stream(self._device)
            event = torch.cuda.Event(enable_timing=True)
            event.record(stream)
        except RuntimeError as why:
            logger.warning("%s is not timed: %s", self._device, str(why).partition("\n")[0])
            return None
        return Mark(event, stream.cuda_stream)

    def resolved(self, pairs: Sequence[tuple[Event, Any]]) -> list[Event]:
        """The events, with the times of their marks (pairs of what `now` gave, or None) on the host's clock."""
        found = [event for event, _ in pairs]
        last = self.now()
        if self._origin is None or last is None:
            return found
        try:
            last.event.synchronize()  # streams beside this one have been joined by it
            for number, (event, marks) in enumerate(pairs):
                if marks is not None and None not in marks:
                    found[number] = self._timed(event, *marks)
        except RuntimeError as why:
            logger.warning("%s is not timed to the end: %s", self._device, str(why).partition("\n")[0])
        return found

    def _timed(self, event: Event, begun: Mark, ended: Mark) -> Event:
        assert self._origin is not None
        # in milliseconds of single precision: a difference of two would be coarse
        started = self._began + round(1e6 * self._origin.event.elapsed_time(begun.event))
        lasted = round(1e6 * begun.event.elapsed_time(ended.event))
        return replace(event, on_device=(started, started + lasted), stream=begun.stream)
