"""What a call does, as ranges: NVTX for Nsight, a trace and sums for who has none.

    call > encode | trace | plan | iteration p > wave k > network | wave_update | checkpoint | record | decode

- encode, decode: the pipeline's own code before and after its loop.
- trace: the one turn of the pipeline's loop that is recorded. Of a loop that is driven it is the first turn, and holds
  the network call of the first wave.
- plan: choosing what to run, with the network calls that measure what they cost, and making its tables and memory.
- iteration p: the waves up to checkpoint p; of SRDS, 0 is the coarse sweep.
- wave k: its category is "coarse", "fine" or "mixed", its payload the number of rows.
- network: one call; payload: rows. Where coarse rows run beside the others, the wave has a range for each, "coarse" and
  "fine", around its call.
- wave_update: the solver's work between two network calls, whatever the method.
- checkpoint: the decision to stop; waits for the device.
- record: graphs are recorded for later calls. The ranges in it are those of the waves that are recorded.
- stock: the pipeline's own loop, in the place of all others, where a call cannot be accelerated.

A replay of a graph runs nothing in Python: there an iteration holds "replay" for every launch, with the number of its
waves as payload, and "checkpoint". Which node of a graph belongs to which wave, and whether to its coarse rows, the
ranges in "record" tell: a node was made in them (`profiling/report.py` follows that).

Ranges cost nothing worth counting while nobody looks: `active` is asked, and that is all.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from .errors import InvalidArgument
from .program import Program, Sweeps
from .trace import Event, Trace

DOMAIN = "srds_fast"
VARIABLE = "SRDS_FAST_PROFILE"
NVTX = "nvtx"
COLOURS = {
    "call": 0x7F7F7F, "encode": 0xC7C7C7, "trace": 0x8C564B, "plan": 0xE377C2, "iteration": 0x9467BD,
    "coarse": 0xFF7F0E, "fine": 0x1F77B4, "mixed": 0x2CA02C, "network": 0x17BECF, "wave_update": 0xD62728,
    "checkpoint": 0xBCBD22, "replay": 0x1F77B4, "record": 0xE377C2, "decode": 0xC7C7C7, "stock": 0x7F7F7F,
}  # fmt: skip
"""By category: what a range is of."""

_PAYLOAD = {
    "iteration": "iteration", "checkpoint": "iteration", "network": "rows", "coarse": "rows", "fine": "rows",
    "replay": "waves",
}  # fmt: skip
"""What the payload of a range is, where it is not told by more."""
# their ranges are of other waves than those of the call
_ASIDE = ("plan", "record")
# on a CUDA device these are timed there as well
_ON_DEVICE = ("iteration", "coarse", "fine", "mixed", "network", "wave_update", "replay")

Sums = dict[str, dict[str, float | int | None]]

active = False
"""Whether anybody looks."""


class _Domain:
    """The NVTX domain. What is pushed is prepared once for each name, category and payload."""

    def __init__(self) -> None:
        import nvtx

        self._domain: Any = nvtx.get_domain(DOMAIN)
        self._known: dict[tuple[str, str, int | None], Any] = {}
        self.pop = self._domain.pop_range

    def push(self, name: str, category: str, payload: int | None) -> None:
        key = name, category, payload
        attributes = self._known.get(key)
        if attributes is None:
            attributes = self._known[key] = self._domain.get_event_attributes(
                message=name, color=COLOURS[category], category=category, payload=payload
            )
        self._domain.push_range(attributes)


class _Watchers:
    """Who looks: Nsight through NVTX, and traces."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_nvtx = 0
        self.domain: _Domain | None = None
        self.traces: tuple[Trace, ...] = ()

    def add(self, trace: Trace | None) -> None:
        with self._lock:
            self.domain = self.domain or _Domain()
            self._of_nvtx += 1
            self.traces += () if trace is None else (trace,)
            self._tell()

    def remove(self, trace: Trace | None) -> None:
        with self._lock:
            self._of_nvtx -= 1
            self.traces = tuple(each for each in self.traces if each is not trace)
            self._tell()

    def _tell(self) -> None:
        global active
        active = self._of_nvtx > 0


_watchers = _Watchers()


class _Calls(threading.local):
    """The calls that a thread is in, outermost first."""

    def __init__(self) -> None:
        self.open: list[Call] = []


_calls = _Calls()


class _Open:
    """A range that has begun."""

    __slots__ = ("args", "category", "mark", "name", "pop", "started")

    def __init__(self, name: str, category: str, payload: int | None, args: dict[str, Any], mark: Any) -> None:
        self.name, self.category, self.args, self.mark = name, category, args, mark
        domain = _watchers.domain
        assert domain is not None
        domain.push(name, category, payload)
        self.pop = domain.pop
        self.started = Event.now()

    def end(self, depth: int) -> Event:
        stopped = Event.now()
        self.pop()
        return Event(self.name, self.category, self.started, stopped, depth, self.args)


class Call:
    """The ranges of one call, in the thread that makes it.

    Args:
        what: is called.
        device: of its network, asked where times on it are wanted.

    Attributes:
        at: category of the range right below the call, "" where there is none.
    """

    def __init__(self, what: str, device: Callable[[], Any]) -> None:
        self._marks: Any = None
        if _watchers.traces and (on := device()).type == "cuda":
            from .engine.marks import Marks

            self._marks = Marks(on)
        self._open: list[_Open] = []
        self.at = ""
        self._done: list[tuple[Event, Any]] = []
        self._aside: list[Event] = []
        self.push("call", "call", args={"of": what})

    @property
    def depth(self) -> int:
        """Ranges that are open."""
        return len(self._open)

    def push(self, name: str, category: str, payload: int | None = None, args: dict[str, Any] | None = None) -> None:
        """Begin a range in the one begun last."""
        mark = self._marks.now() if self._is_timed(category) else None
        if args is None:
            args = {} if payload is None else {_PAYLOAD[category]: payload}
        self._open.append(_Open(name, category, payload, args, mark))

    def pop_to(self, depth: int) -> None:
        """End ranges, the innermost first, until so many are open."""
        while len(self._open) > depth:
            ended = self._open.pop()
            marks = None if ended.mark is None else (ended.mark, self._marks.now())
            event = ended.end(len(self._open))
            if event.depth > 1 and self.at in _ASIDE:
                self._aside.append(event)
            else:
                self._done.append((event, marks))

    def phase(self, name: str, category: str | None = None, payload: int | None = None) -> None:
        """End what the call was at and begin this."""
        self.pause()
        self.at = category or name
        self.push(name, self.at, payload)

    def pause(self) -> None:
        """End what the call was at."""
        self.pop_to(1)
        self.at = ""

    def end(self) -> Sums:
        """End the call. Returns sums by phase, see `Report.timeline`."""
        self.pop_to(0)
        done = [event for event, _ in self._done] if self._marks is None else self._marks.resolved(self._done)
        for trace in _watchers.traces:
            trace.take(done + self._aside)
        return _sums(done)

    def _is_timed(self, category: str) -> bool:
        return self._marks is not None and category in _ON_DEVICE and self.at not in _ASIDE


def _sums(events: list[Event]) -> Sums:
    """Count, seconds and seconds on the device by phase, in the order in which they first began."""
    sums: Sums = {}
    for event in sorted(events, key=lambda event: (event.started, event.depth)):
        phase = "wave" if event.name.startswith("wave ") else event.category
        before = sums.get(phase, {"count": 0, "seconds": 0.0, "device_seconds": None})
        on_device = event.device_seconds
        sums[phase] = {
            "count": (before["count"] or 0) + 1,
            "seconds": (before["seconds"] or 0.0) + event.seconds,
            "device_seconds": before["device_seconds"]
            if on_device is None
            else (before["device_seconds"] or 0.0) + on_device,
        }
    return sums


class _Span(AbstractContextManager[None]):
    __slots__ = ("_call", "_depth", "_what")

    def __init__(self, call: Call, *what: Any) -> None:
        self._call, self._what = call, what

    def __enter__(self) -> None:
        self._depth = self._call.depth
        self._call.push(*self._what)

    def __exit__(self, *why: object) -> None:
        self._call.pop_to(self._depth)


_OFF: AbstractContextManager[None] = nullcontext()


def span(name: str, category: str, payload: int | None = None) -> AbstractContextManager[None]:
    """A range of the call that this thread makes; nothing outside of calls, and where nobody looks."""
    if not active or not _calls.open:
        return _OFF
    return _Span(_calls.open[-1], name, category, payload)


def wave(program: Program, number: int) -> AbstractContextManager[None]:
    """The range of a wave that is recorded."""
    if not active or not _calls.open:
        return _OFF
    return _Span(_calls.open[-1], *_of_wave(program, number))


def phase(name: str) -> None:
    """What the call of this thread comes to now: encode, trace, plan, record, decode or stock."""
    if active and _calls.open:
        _calls.open[-1].phase(name)


@contextmanager
def profile(trace: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Show what calls do, in all threads, while this is open.

    Ranges go to NVTX, domain "srds_fast", for Nsight; `report.timeline` holds their sums. Without a tool that listens
    to NVTX a range takes about three microseconds. The module's own description has their names.

    Args:
        trace: a file to write at the end, in Chrome's format, for Perfetto or chrome://tracing: all ranges with times
            of the host, and, on a CUDA device, times of the device by events. These are read when a call has ended,
            which then waits for its device; leave the file out under Nsight.

    Raises:
        InvalidArgument: the file cannot be written, as its folder is not there.
    """
    kept = None if trace is None else _trace_to(Path(trace))
    _watchers.add(kept)
    try:
        yield
    finally:
        _watchers.remove(kept)
        if kept is not None:
            kept.write()


def profile_as(setting: str) -> AbstractContextManager[None]:
    """`profile` as a word: of the environment variable, and of the command line.

    Args:
        setting: "nvtx" or "1": ranges alone; "" or "0": nothing; else the file to write.
    """
    if setting in ("", "0"):
        return nullcontext()
    return profile(None if setting in (NVTX, "1") else setting)


def _trace_to(path: Path) -> Trace:
    if path.is_dir() or not path.parent.is_dir():
        raise InvalidArgument(
            f"{path} cannot be written: {'it is a folder' if path.is_dir() else f'there is no folder {path.parent}'}. "
            "A trace is one file. Give its name in a folder that is there."
        )
    return Trace(path)


@contextmanager
def unseen() -> Iterator[None]:
    """What this thread does within has no ranges: it is no part of a call, and is timed."""
    calls, _calls.open = _calls.open, []
    try:
        yield
    finally:
        _calls.open = calls


class Timeline:
    """Filled when a call has ended.

    Attributes:
        sums: see `Report.timeline`; None where nobody looked.
    """

    sums: Sums | None = None


@contextmanager
def call(what: str, device: Callable[[], Any], timeline: Timeline) -> Iterator[None]:
    """A call of this thread; what: is called; device: of its network, asked if needed; timeline: filled at the end."""
    if not active:
        yield
        return
    begun = Call(what, device)
    _calls.open.append(begun)
    try:
        yield
    finally:
        _calls.open.remove(begun)
        timeline.sums = begun.end()


class Waves:
    """The ranges of a run: its iterations, their waves, and what is done in each.

    Args:
        call: that makes the run.
        program: its waves.
    """

    def __init__(self, call: Call, program: Program) -> None:
        self._call = call
        self._program = program
        self._replayed = False
        self._iteration: int | None = 1 if isinstance(program, Sweeps) else 0

    def follow(self) -> None:
        """From now on waves are replayed: they are not run one by one."""
        self._replayed = True

    def advance(self) -> None:
        """The solver takes an output, or begins."""
        if self._iteration is not None:
            self._call.phase(f"iteration {self._iteration}", "iteration", self._iteration)
            self._iteration = None
        if not self._replayed:
            self._call.push("wave_update", "wave_update")

    def wave(self, number: int) -> None:
        """A wave is handed out."""
        if not self._replayed:
            self._call.pop_to(2)
            self._call.push(*_of_wave(self._program, number))

    def checkpoint(self, iteration: int) -> None:
        """An iteration has given its sample, which is now looked at."""
        self._call.pop_to(3)
        self._call.push("checkpoint", "checkpoint", iteration)

    def judged(self, iteration: int, *, ends: bool) -> None:
        """It has been looked at; ends: no sample goes on."""
        self._call.pause()
        if not ends:
            self._call.phase(f"iteration {iteration + 1}", "iteration", iteration + 1)

    def end(self) -> None:
        """The run is over, or left."""
        if self._call.at == "iteration":
            self._call.pause()


def _of_wave(program: Program, number: int) -> tuple[str, str, int, dict[str, Any]]:
    """Name, category, payload and what else a trace tells of a wave."""
    rows = program.waves[number].rows
    coarse, fine = sum(row.coarse for row in rows), sum(row.fine for row in rows)
    category = "fine" if coarse == 0 else "coarse" if fine == 0 else "mixed"
    return f"wave {number}", category, len(rows), {"rows": len(rows), "coarse": coarse, "fine": fine}


def waves_of(program: Program) -> Waves | None:
    """The ranges of a run that the call of this thread makes; None where nobody looks."""
    return Waves(_calls.open[-1], program) if active and _calls.open else None


def _as_the_environment_says() -> None:
    watching = ExitStack()
    watching.enter_context(profile_as(os.environ.get(VARIABLE, "")))
    atexit.register(watching.close)


_as_the_environment_says()
