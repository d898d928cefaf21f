"""Who looks at calls, and the ranges of each call. The names of ranges are described in `srds_fast.telemetry`."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import device_events
from .chrome_trace import ChromeTrace, running

if TYPE_CHECKING:
    from ..program import Program

VARIABLE = "SRDS_FAST_PROFILE"
RANGES = ("1", "true", "on", "yes", "nvtx")
NOTHING = ("", "0", "false", "off", "no")
DOMAIN = "srds_fast"
COLOURS = {
    "call": 0x7F7F7F, "encode": 0xC7C7C7, "trace": 0x8C564B, "plan": 0xE377C2, "iteration": 0x9467BD,
    "coarse": 0xFF7F0E, "fine": 0x1F77B4, "mixed": 0x2CA02C, "network": 0x17BECF, "wave_update": 0xD62728,
    "checkpoint": 0xBCBD22, "replay": 0x1F77B4, "record": 0xE377C2, "decode": 0xC7C7C7, "stock": 0x7F7F7F,
}  # fmt: skip
"""Of ranges in Nsight, by category."""

# Network calls in these measure costs or record graphs: they are no waves of the call.
_ASIDE = ("plan", "record")
_ON_DEVICE = ("iteration", "coarse", "fine", "mixed", "network", "wave_update", "replay")

Sums = dict[str, dict[str, float | int | None]]

logger = logging.getLogger("srds_fast")


class _Thread(threading.local):
    """The watched calls that a thread is in, outermost first."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []


_thread = _Thread()
# Everybody who looks: a trace, or None for ranges alone.
_looking: list[ChromeTrace | None] = []
_environment: ExitStack | None = None
_reading_environment = threading.Lock()
_OFF: AbstractContextManager[None] = nullcontext()


@contextmanager
def profile(trace: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Show what calls do that begin while this is open, in all threads.

    Ranges go to NVTX, domain "srds_fast", for Nsight, and to a torch profiler that runs; `report.timeline` holds their
    totals. Without a tool that listens, a range takes about three microseconds. `srds_fast.telemetry` lists the names.

    Args:
        trace: a file for the Chrome trace (Perfetto, chrome://tracing) that the torch profiler records meanwhile and
            writes at the end: the ranges, all operations, and the kernels of a CUDA device. Operations are slower while
            it records, so costs measured meanwhile are higher. It holds the first 50 calls (the log says so), a call
            that runs on at the end up to there. Calls have device times in their timeline, by events; these are read
            when a call has ended, which then waits for its device. Leave the file out under Nsight. "{pid}" in its name
            is replaced by the number of the process: several would overwrite each other's file.

    Raises:
        InvalidArgument: the file cannot be written, as its folder does not exist; or another trace or torch profiler is
            running in this process.
    """
    kept = None if trace is None else ChromeTrace(Path(str(trace).replace("{pid}", str(os.getpid()))))
    _looking.append(kept)
    failed = True
    try:
        yield
        failed = False
    finally:
        _looking.remove(kept)
        try:
            if kept is not None:
                kept.write()
        except OSError as why:
            if not failed:
                raise
            logger.warning("The trace was not written: %s", why)  # the first error says more


def profile_as(setting: str) -> AbstractContextManager[None]:
    """`profile` as a word: of the environment variable, and of the command line.

    Args:
        setting: one of `RANGES`, for ranges alone; one of `NOTHING`; else the file to write.
    """
    if setting.lower() in NOTHING:
        return nullcontext()
    return profile(None if setting.lower() in RANGES else setting)


def _follow_environment() -> None:
    """At the first call: look until the process exits, if its environment asks for it."""
    global _environment
    with _reading_environment:
        if _environment is None:
            watching = ExitStack()
            watching.enter_context(profile_as(os.environ.get(VARIABLE, "")))
            atexit.register(watching.close)
            _environment = watching


class Timeline:
    """Filled when a call has ended.

    Attributes:
        sums: see `Report.timeline`; None where nobody looked.
    """

    sums: Sums | None = None


@contextmanager
def call(what: str, device: Callable[[], torch.device], timeline: Timeline) -> Iterator[None]:
    """A call of this thread.

    Args:
        what: is called: a name for the trace.
        device: of its network; asked only if it is timed.
        timeline: filled at the end.

    Raises:
        InvalidArgument: what the environment asks for cannot be had, see `profile`.
    """
    _follow_environment()
    if not _looking:
        yield
        return
    traces = [trace for trace in _looking if trace is not None]
    on = device() if traces else None
    begun = _Call(what, on if on is not None and on.type == "cuda" else None)
    _thread.calls.append(begun)
    try:
        yield
    finally:
        _thread.calls.remove(begun)
        begun.pop_to(0)
        for trace in traces:
            trace.count_call()
        timeline.sums = begun.sums()


@contextmanager
def unseen() -> Iterator[None]:
    """What this thread does within has no ranges: it is no part of a call, and is timed."""
    calls, _thread.calls = _thread.calls, []
    try:
        yield
    finally:
        _thread.calls = calls


def span(name: str, category: str, payload: int | None = None) -> AbstractContextManager[None]:
    """A range in the watched call that this thread is in; nothing without one."""
    calls = _thread.calls
    return calls[-1].span(name, category, payload) if calls else _OFF


def wave(program: Program, number: int) -> AbstractContextManager[None]:
    """The range of a wave that is recorded."""
    return span(*_of_wave(program, number)) if _thread.calls else _OFF


def iteration(program: Program, checkpoints: int) -> AbstractContextManager[None]:
    """The range of an iteration that is recorded: what comes after so many checkpoints."""
    number = checkpoints + program.first_iteration
    return span(f"iteration {number}", "iteration", number)


def replay(program: Program, checkpoints: int, waves: int) -> AbstractContextManager[None]:
    """The range of one launch of so many waves, after so many checkpoints."""
    return span(f"replay {checkpoints + program.first_iteration}", "replay", waves)


def recording() -> AbstractContextManager[None]:
    """The range of recording, in a call that may be in its phase "record" already, or in the middle of a replay."""
    calls = _thread.calls
    return span("record", "record") if calls and calls[-1].at != "record" else _OFF


def phase(name: str) -> None:
    """The call of this thread begins its next phase: encode, trace, plan, record, decode or stock."""
    if _thread.calls:
        _thread.calls[-1].phase(name)


def waves_of(program: Program) -> _Waves | None:
    """The ranges of a run in the call of this thread; None where nobody looks."""
    return _Waves(_thread.calls[-1], program) if _thread.calls else None


def _of_wave(program: Program, number: int) -> tuple[str, str, int]:
    """Name, category and payload of a wave."""
    rows = program.waves[number].rows
    coarse, fine = any(row.coarse for row in rows), any(row.fine for row in rows)
    return f"wave {number}", "mixed" if coarse and fine else "coarse" if coarse else "fine", len(rows)


@functools.cache
def _domain() -> Any:
    import nvtx

    return nvtx.get_domain(DOMAIN)


@dataclass(slots=True)
class _Open:
    """A range that has begun.

    Attributes:
        phase: its line of the timeline; None if it is not counted.
        started: on the host's clock, in seconds.
        record: what a torch profiler has to be handed at the end.
        event: in its stream, if the device is timed.
        aside: ranges in it are not counted.
    """

    phase: str | None
    started: float
    record: Any
    event: torch.cuda.Event | None
    aside: bool


@dataclass(slots=True)
class _Total:
    """What a phase comes to. pairs: events on the device, start and end of each range."""

    count: int = 0
    seconds: float = 0.0
    pairs: list[device_events.Pair] = field(default_factory=list)


class _Call:
    """The ranges of one call, in the thread that makes it: a stack.

    Args:
        what: is called.
        device: a CUDA device that is to be timed, or None.

    Attributes:
        at: the phase that the call is in, by category; "" between two.
    """

    def __init__(self, what: str, device: torch.device | None) -> None:
        self.at = ""
        self._device = device
        self._domain = _domain()
        self._open: list[_Open] = []
        self._totals: dict[str, _Total] = {}
        self.push("call", "call", of=what)

    @contextmanager
    def span(self, name: str, category: str, payload: int | None) -> Iterator[None]:
        """A range for the time of a context."""
        depth = len(self._open)
        self.push(name, category, payload)
        try:
            yield
        finally:
            self.pop_to(depth)

    def push(self, name: str, category: str, payload: int | None = None, *, of: str = "") -> None:
        """Begin a range in the one begun last. of: more for the trace."""
        is_wave = name.startswith("wave ")
        aside = bool(self._open) and self._open[-1].aside
        phase = None if aside else "wave" if is_wave else category
        if phase is not None:
            self._totals.setdefault(phase, _Total())
        self._domain.push_range(
            self._domain.get_event_attributes(message=name, color=COLOURS[category], category=category, payload=payload)
        )
        record = None
        if running():
            of = f"{category}, {payload} {'row' if payload == 1 else 'rows'}" if is_wave else of
            # not torch.profiler.record_function: that is an operation, which recording a graph would record
            record = torch.autograd._record_function_with_args_enter(f"{name} ({of})" if of else name)
        event = self._event() if phase is not None and category in _ON_DEVICE else None
        self._open.append(_Open(phase, time.perf_counter(), record, event, aside or category in _ASIDE))

    def pop_to(self, depth: int, *, dropped: bool = False) -> None:
        """End ranges, the innermost first, until so many are open. dropped: what they stand for was not run."""
        while len(self._open) > depth:
            ended = self._open.pop()
            if ended.phase is not None and not dropped:
                total = self._totals[ended.phase]
                if ended.event is not None:
                    total.pairs.append((ended.event, self._event()))
                total.count += 1
                total.seconds += time.perf_counter() - ended.started
            if ended.record is not None:
                torch.autograd._record_function_with_args_exit(ended.record)
            self._domain.pop_range()

    def _event(self) -> torch.cuda.Event | None:
        return None if self._device is None else device_events.event_on(self._device)

    def phase(self, name: str, category: str | None = None, payload: int | None = None) -> None:
        """Begin a phase, and end the one before; nothing if the call is in it already."""
        category = category or name
        if self.at == category == name:
            return
        self.pause()
        self.push(name, category, payload)
        self.at = category

    def pause(self) -> None:
        """End the phase that the call is in."""
        self.pop_to(1)
        self.at = ""

    def sums(self) -> Sums:
        """Totals by phase, in the order in which they first began, see `Report.timeline`. Waits for the device."""
        return {
            phase: {
                "count": total.count,
                "seconds": total.seconds,
                "device_seconds": device_events.seconds_between(total.pairs),
            }
            for phase, total in self._totals.items()
            if total.count
        }


class _Waves:
    """The ranges of a run: its iterations, their waves, and what is done in each.

    Args:
        call: that makes the run.
        program: its waves.
    """

    def __init__(self, call: _Call, program: Program) -> None:
        self._call = call
        self._program = program
        self._begun = self._replayed = False

    def follow(self) -> None:
        """From now on waves are replayed: they are not run one by one."""
        self._replayed = True

    def advance(self) -> None:
        """The solver takes an output, or begins."""
        if not self._begun:
            self._begun = True
            self._iteration(self._program.first_iteration)
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
            self._iteration(iteration + 1)

    def end(self, *, dropped: bool = False) -> None:
        """The run is over, or left. dropped: the wave that was handed out last has not been run."""
        if self._call.at == "iteration":
            self._call.pop_to(2, dropped=dropped)
            self._call.pause()

    def _iteration(self, number: int) -> None:
        self._call.phase(f"iteration {number}", "iteration", number)
