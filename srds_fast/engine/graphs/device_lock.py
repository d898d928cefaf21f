"""One call at a time replays on a device: its graphs share one pool of memory, and each has its own static tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from ...errors import CaptureFailed

# seconds; longer than any call: a wait this long is a deadlock
LONGEST_WAIT = 30.0


class DeviceBusy(CaptureFailed):
    """Another call holds the graphs of the device."""


class _Lock:
    """The lock of one device, the thread whose run is being replayed, and an event after the last replay."""

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self.owner: int | None = None
        self.done: Any = None


_lock_of = cache(_Lock)


@contextmanager
def device_lock(device: torch.device) -> Iterator[None]:
    """Hold a device's graphs, or raise DeviceBusy. Other threads wait for the host, their streams for the device."""
    mine = _lock_of(device)
    if not mine.lock.acquire(timeout=LONGEST_WAIT):
        raise DeviceBusy(
            f"another call has used the graphs of {device} for over {LONGEST_WAIT:.0f} seconds, and may wait for this "
            "call"
        )
    try:
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if stream is not None and mine.done is not None:
            stream.wait_event(mine.done)
        try:
            yield
        finally:
            if stream is not None:
                mine.done = stream.record_event()
    finally:
        mine.lock.release()


@contextmanager
def replaying(device: torch.device) -> Iterator[None]:
    """Hold the lock for the replay of a run. What this thread calls within it must not replay as well."""
    with device_lock(device):
        mine = _lock_of(device)
        mine.owner = threading.get_ident()
        try:
            yield
        finally:
            mine.owner = None


def in_a_replay(device: torch.device) -> bool:
    """Whether this thread is in the middle of replaying a run."""
    return _lock_of(device).owner == threading.get_ident()
