"""What is measured of a bench beside its time, and by which clock its time is taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from srds_fast.telemetry.environment import environment

from .dispatched import Dispatched
from .layout import is_dirty, revision
from .setups import Prepared

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


class EventClock:
    """Seconds by CUDA events: each reading waits until the device has done all it was given before."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last = self._recorded()

    def __call__(self) -> float:
        now = self._recorded()
        # from the reading before: events hold single precision, which is coarse over a whole session
        self._seconds += self._last.elapsed_time(now) / 1e3
        self._last = now
        return self._seconds

    def _recorded(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event


def clock() -> Callable[[], float]:
    """What times a bench on this machine."""
    return EventClock() if ON_GPU else time.perf_counter


def around(prepared: Prepared) -> dict[str, Any]:
    """What one call takes beside time, all in whole numbers; it has been called before.

    Returns:
        what it ran, as it says itself; launches; bytes_moved by `wave_update`; and peak_memory, of a CUDA device, in
        bytes beyond what was there before the call; on the CPU, which cannot tell, bytes_allocated in it altogether.
        Of what replays graphs only what it ran: none of the others could be seen from here.
    """
    found: dict[str, Any] = {}
    if prepared.replays:
        return {**prepared.ran()}
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prepared.call()
        torch.cuda.synchronize()
        found["peak_memory"] = torch.cuda.max_memory_allocated() - before
    if prepared.countable:
        with Dispatched(prepared.stand_in) as dispatched:
            prepared.call()
        counts = dispatched.counts
        found |= {"launches": counts.launches, "bytes_moved": counts.bytes_moved}
        if not ON_GPU:
            found |= {"allocations": counts.allocations, "bytes_allocated": counts.bytes_allocated}
    return {**prepared.ran(), **found}


@cache
def where() -> dict[str, Any]:
    """What it was measured on, and of which commit."""
    return {
        "gpu": torch.cuda.get_device_name() if ON_GPU else None,
        "versions": environment(),
        "commit": revision(),
        "dirty": is_dirty(),
    }
