"""Ranges kept in memory, and the Chrome trace that is made of them (Perfetto and chrome://tracing open it)."""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# some hundred bytes each; calls beyond it are counted and not kept
MOST_EVENTS = 300_000

logger = logging.getLogger("srds_fast")


@dataclass(frozen=True, slots=True)
class Event:
    """A range that has ended.

    Attributes:
        name, category: see `telemetry`.
        started, stopped: on the host, nanoseconds of `now`.
        depth: ranges around it.
        args: what else is known of it.
        on_device: when the device began and ended what was launched in it, nanoseconds of `now`; None: not timed.
        stream: on which.
    """

    name: str
    category: str
    started: int
    stopped: int
    depth: int
    args: dict[str, Any]
    on_device: tuple[int, int] | None = None
    stream: int = 0

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


class _Thread(threading.local):
    """A number that no other thread has had: the system gives those of threads that have ended to new ones."""

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self.number = next(self._numbers)


_thread = _Thread()


class Trace:
    """The ranges of the calls that end while it is open.

    Args:
        path: where `write` writes them.

    Attributes:
        dropped: ranges that there was no room for; a call is kept whole or not at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dropped = 0
        self._lock = threading.Lock()
        self._began = Event.now()
        self._kept = 0
        self._calls: list[tuple[int, Sequence[Event]]] = []
        self._threads: dict[int, str] = {}

    def take(self, events: Sequence[Event]) -> None:
        """Keep the ranges of a call that this thread has made."""
        with self._lock:
            if self._kept + len(events) > MOST_EVENTS:
                if not self.dropped:
                    logger.warning("The trace %s is full: %d ranges. Later calls are not in it.", self.path, self._kept)
                self.dropped += len(events)
                return
            self._kept += len(events)
            self._threads[_thread.number] = threading.current_thread().name
            self._calls.append((_thread.number, events))

    def write(self) -> None:
        """Write the file, whole or not at all."""
        with self._lock:
            calls, threads, dropped = self._calls.copy(), self._threads.copy(), self.dropped
        process = os.getpid()
        tracks = _Tracks(process)
        for thread, name in threads.items():
            tracks.number((thread, None), f"host, {name}")
        found: list[dict[str, Any]] = []
        for thread, events in calls:
            for event in sorted(events, key=lambda event: (event.started, event.depth)):
                found.append(
                    self._complete(event, process, tracks.number((thread, None)), event.started, event.stopped)
                )
                if event.on_device is not None:
                    # ranges of one thread and stream lie in one another, others may overlap
                    title = f"device, stream {event.stream:#x}, by events of {threads[thread]}"
                    number = tracks.number((thread, event.stream), title)
                    found.append(self._complete(event, process, number, *event.on_device))
        whole = {
            "traceEvents": [*tracks.names, *found],
            "displayTimeUnit": "ms",
            "otherData": {"domain": "srds_fast", "dropped_events": dropped},
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


class _Tracks:
    """Lines of the picture, each with a name.

    Attributes:
        names: as events.
    """

    def __init__(self, process: int) -> None:
        self._process = process
        self._numbers: dict[tuple[int, int | None], int] = {}
        self.names = [_named("process_name", process, 0, "srds_fast")]

    def number(self, key: tuple[int, int | None], name: str = "") -> int:
        """Of the track of a thread, or of a stream as that thread saw it; with its name where it may be new."""
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers) + 1
            self.names.append(_named("thread_name", self._process, self._numbers[key], name))
        return self._numbers[key]


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
