"""Ranges kept in memory, and the Chrome trace that is made of them (Perfetto and chrome://tracing open it)."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# some hundred bytes each; what comes after is counted and not kept
MOST_EVENTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Event:
    """A range that has ended.

    Attributes:
        name, category: see `telemetry`.
        started, stopped: on the host, nanoseconds of `now`.
        depth: ranges around it.
        args: what else is known of it.
        on_device: when the device began and ended what was launched in it, nanoseconds of `now`; None: not timed.
        thread: that it is of.
    """

    name: str
    category: str
    started: int
    stopped: int
    depth: int
    args: dict[str, Any]
    on_device: tuple[int, int] | None = None
    thread: int = 0

    @staticmethod
    def now() -> int:
        """The clock of events, in nanoseconds."""
        return time.perf_counter_ns()

    @property
    def seconds(self) -> float:
        """On the host."""
        return 1e-9 * (self.stopped - self.started)

    @property
    def device_seconds(self) -> float | None:
        """On the device, from the first launch to the last."""
        return None if self.on_device is None else 1e-9 * (self.on_device[1] - self.on_device[0])


class Trace:
    """The ranges of all calls made while it is open.

    Args:
        path: where `write` writes them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dropped = 0
        self._began = Event.now()
        self._events: list[Event] = []
        self._threads: dict[int, str] = {}

    def take(self, events: Sequence[Event]) -> None:
        """Keep the ranges of a call that this thread has made."""
        thread = threading.get_ident()
        self._threads[thread] = threading.current_thread().name
        room = max(0, MOST_EVENTS - len(self._events))
        self._events += [replace(event, thread=thread) for event in events[:room]]
        self.dropped += max(0, len(events) - room)

    def write(self) -> None:
        """Write the file, whole or not at all."""
        process = os.getpid()
        numbers = {thread: number for number, thread in enumerate(self._threads, start=1)}
        found: list[dict[str, Any]] = [_named("process_name", process, 0, "srds_fast")]
        found += [
            _named("thread_name", process, numbers[each], f"host, {name}") for each, name in self._threads.items()
        ]
        device = len(numbers) + 1
        if any(event.on_device is not None for event in self._events):
            found.append(_named("thread_name", process, device, "device, by CUDA events"))
        for event in sorted(self._events, key=lambda event: (event.started, -event.stopped)):
            found.append(self._complete(event, process, numbers[event.thread], event.started, event.stopped))
            if event.on_device is not None:
                found.append(self._complete(event, process, device, *event.on_device))
        whole = {
            "traceEvents": found,
            "displayTimeUnit": "ms",
            "otherData": {"domain": "srds_fast", "dropped_events": self.dropped},
        }
        beside = self.path.with_name(f"{self.path.name}.{process}.tmp")
        beside.write_text(json.dumps(whole) + "\n")
        beside.replace(self.path)

    def _complete(self, event: Event, process: int, thread: int, started: int, stopped: int) -> dict[str, Any]:
        return {
            "name": event.name,
            "cat": event.category,
            "ph": "X",
            "ts": 1e-3 * (started - self._began),
            "dur": 1e-3 * (stopped - started),
            "pid": process,
            "tid": thread,
            "args": event.args,
        }


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
