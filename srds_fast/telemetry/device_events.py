"""Seconds on a CUDA device: pairs of events around ranges, on the stream they are in."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

Pair = tuple[torch.cuda.Event | None, torch.cuda.Event | None]

logger = logging.getLogger("srds_fast")


def event_on(device: torch.device) -> torch.cuda.Event | None:
    """An event in the current stream; None while a graph is captured (such an event has no time), and on failure.

    A device that has failed is logged and not raised: the call that is timed raises the error itself.
    """
    try:
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
    except RuntimeError as why:
        logger.warning("%s is not timed: %s", device, str(why).partition("\n")[0])
        return None
    return event


def seconds_between(pairs: Sequence[Pair]) -> float | None:
    """The sum over pairs of (start, end), once the device has come to them; None if no pair has times."""
    known = [(start, end) for start, end in pairs if start is not None and end is not None]
    try:
        for _, end in known:
            end.synchronize()
        return 1e-3 * sum(start.elapsed_time(end) for start, end in known) if known else None
    except RuntimeError as why:
        logger.warning("The device is not timed: %s", str(why).partition("\n")[0])
        return None
