"""One device replays for one call at a time: its graphs share their memory, and each recording its static tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from ...errors import CaptureFailed

# a call that waits longer than calls take waits for something that waits for it
LONGEST_WAIT = 30.0


class Busy(CaptureFailed):
    """Another call has the graphs of the device."""


class _Turn:
    """Whose turn it is on a device.

    Attributes:
        owner: the thread whose replay it is; None while none replays.
        done: event after the last replay.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.owner: int | None = None
        self.done: Any = None


@cache
def _turn_of(device: torch.device) -> _Turn:
    return _Turn()


@contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """Have the graphs of a device to oneself: until the host has done, and until the device has.

    Raises:
        Busy: it takes too long.
    """
    mine = _turn_of(device)
    if not mine.lock.acquire(timeout=LONGEST_WAIT):
        raise Busy(
            f"another call has had the graphs of {device} for {LONGEST_WAIT:.0f} seconds: it may wait for this one"
        )
    try:
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
    finally:
        mine.lock.release()


@contextmanager
def replaying(device: torch.device) -> Iterator[None]:
    """A turn, for a replay: what this thread calls in the middle of it must not replay as well."""
    with turn(device):
        mine = _turn_of(device)
        mine.owner = threading.get_ident()
        try:
            yield
        finally:
            mine.owner = None


def replays_here(device: torch.device) -> bool:
    """Whether this thread is in the middle of a replay."""
    return _turn_of(device).owner == threading.get_ident()
