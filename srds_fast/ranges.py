"""The ranges of one call: begun and ended in order, told to NVTX as they are, summed up and kept when the call ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from .solvers.fixed_point.program import Sweeps
from .solvers.program import Program
from .trace import Event, Trace

DOMAIN = "srds_fast"
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

# the ranges in them are of other waves than those of the call
_ASIDE = ("plan", "record")
# on a CUDA device these are timed there as well
_ON_DEVICE = ("iteration", "coarse", "fine", "mixed", "network", "wave_update", "replay")
# that a domain keeps ready to be pushed: as many as the waves of some programs
_MOST_READY = 10_000

Sums = dict[str, dict[str, float | int | None]]


class Domain:
    """The NVTX domain. What is pushed is made ready once for each name, category and payload."""

    def __init__(self) -> None:
        import nvtx

        self._domain: Any = nvtx.get_domain(DOMAIN)
        self._ready: dict[tuple[str, str, int | None], Any] = {}
        self.pop = self._domain.pop_range

    def push(self, name: str, category: str, payload: int | None) -> None:
        """Begin a range in this thread."""
        key = name, category, payload
        attributes = self._ready.get(key)
        if attributes is None:
            if len(self._ready) >= _MOST_READY:
                self._ready.clear()
            attributes = self._ready[key] = self._domain.get_event_attributes(
                message=name, color=COLOURS[category], category=category, payload=payload
            )
        self._domain.push_range(attributes)


class _Open:
    """A range that has begun."""

    __slots__ = ("args", "category", "mark", "name", "started")

    def __init__(self, name: str, category: str, args: dict[str, Any], mark: Any) -> None:
        self.name, self.category, self.args, self.mark, self.started = name, category, args, mark, Event.now()


class Call:
    """The ranges of one call, in the thread that makes it.

    Args:
        what: is called.
        domain: that is told.
        traces: that keep it.
        device: of its network, asked where a trace wants times of it.

    Attributes:
        at: category of the range right below the call, "" where there is none.
    """

    def __init__(self, what: str, domain: Domain, traces: Sequence[Trace], device: Callable[[], Any]) -> None:
        self._domain, self._traces = domain, traces
        self._marks: Any = None
        if traces and (on := device()).type == "cuda":
            from .engine.marks import Marks

            self._marks = Marks(on)
        self._open: list[_Open] = []
        self._aside_from: int | None = None
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
        if args is None:
            args = {} if payload is None else {_PAYLOAD[category]: payload}
        timed = self._marks is not None and self._aside_from is None and category in _ON_DEVICE
        self._domain.push(name, category, payload)
        if category in _ASIDE and self._aside_from is None:
            self._aside_from = len(self._open)
        self._open.append(_Open(name, category, args, self._marks.now() if timed else None))

    def pop_to(self, depth: int, *, dropped: bool = False) -> None:
        """End ranges, the innermost first, until so many are open. dropped: what they are of was not run."""
        while len(self._open) > depth:
            ended = self._open.pop()
            stopped = Event.now()
            self._domain.pop()
            event = Event(ended.name, ended.category, ended.started, stopped, len(self._open), ended.args)
            if self._aside_from is not None and self._aside_from == event.depth:
                self._aside_from = None
            if self._aside_from is not None or dropped:
                self._aside.append(event)
            else:
                self._done.append((event, None if ended.mark is None else (ended.mark, self._marks.now())))

    def phase(self, name: str, category: str | None = None, payload: int | None = None) -> None:
        """End what the call was at and begin this, if it is not at it."""
        category = category or name
        if self.at == category == name:
            return
        self.pause()
        self.push(name, category, payload)
        self.at = category

    def pause(self) -> None:
        """End what the call was at."""
        self.pop_to(1)
        self.at = ""

    def end(self) -> Sums:
        """End the call. Returns sums by phase, see `Report.timeline`."""
        self.pop_to(0)
        done = [event for event, _ in self._done] if self._marks is None else self._marks.resolved(self._done)
        for trace in self._traces:
            trace.take(done + self._aside)
        return _sums(done)


def _sums(events: list[Event]) -> Sums:
    """Count, seconds and seconds on the device by phase, in the order in which they first began."""
    by_phase: dict[str, list[Event]] = {}
    for event in sorted(events, key=lambda event: (event.started, event.depth)):
        phase = "wave" if event.name.startswith("wave ") else event.category
        by_phase.setdefault(phase, []).append(event)
    sums: Sums = {}
    for phase, found in by_phase.items():
        on_device = [event.device_seconds for event in found if event.device_seconds is not None]
        sums[phase] = {
            "count": len(found),
            "seconds": sum(event.seconds for event in found),
            "device_seconds": sum(on_device) if on_device else None,
        }
    return sums


class Span(AbstractContextManager[None]):
    """A range of a call, for the time of a context; the arguments are those of `Call.push`."""

    __slots__ = ("_call", "_depth", "_what")

    def __init__(self, call: Call, *what: Any) -> None:
        self._call, self._what = call, what

    def __enter__(self) -> None:
        self._depth = self._call.depth
        self._call.push(*self._what)

    def __exit__(self, *why: object) -> None:
        self._call.pop_to(self._depth)


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
        self._first: int | None = iteration_at(program, 0)

    def follow(self) -> None:
        """From now on waves are replayed: they are not run one by one."""
        self._replayed = True

    def advance(self) -> None:
        """The solver takes an output, or begins."""
        if self._first is not None:
            self._call.phase(f"iteration {self._first}", "iteration", self._first)
            self._first = None
        if not self._replayed:
            self._call.push("wave_update", "wave_update")

    def wave(self, number: int) -> None:
        """A wave is handed out."""
        if not self._replayed:
            self._call.pop_to(2)
            self._call.push(*of_wave(self._program, number))

    def checkpoint(self, iteration: int) -> None:
        """An iteration has given its sample, which is now looked at."""
        self._call.pop_to(3)
        self._call.push("checkpoint", "checkpoint", iteration)

    def judged(self, iteration: int, *, ends: bool) -> None:
        """It has been looked at; ends: no sample goes on."""
        self._call.pause()
        if not ends:
            self._call.phase(f"iteration {iteration + 1}", "iteration", iteration + 1)

    def end(self, *, dropped: bool = False) -> None:
        """The run is over, or left. dropped: the wave that was handed out last has not been run."""
        if self._call.at == "iteration":
            self._call.pop_to(2, dropped=dropped)
            self._call.pause()


def iteration_at(program: Program, checkpoints: int) -> int:
    """The iteration that comes after so many checkpoints: sweeps are counted from 1, as there is no coarse one."""
    return checkpoints + isinstance(program, Sweeps)


def of_wave(program: Program, number: int) -> tuple[str, str, int, dict[str, Any]]:
    """Name, category, payload and what else a trace tells of a wave."""
    rows = program.waves[number].rows
    coarse, fine = sum(row.coarse for row in rows), sum(row.fine for row in rows)
    category = "fine" if coarse == 0 else "coarse" if fine == 0 else "mixed"
    return f"wave {number}", category, len(rows), {"rows": len(rows), "coarse": coarse, "fine": fine}
