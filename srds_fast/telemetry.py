"""What calls do, shown to who looks: ranges for Nsight by NVTX, a trace and sums for who has none.

    call > encode | trace | plan | iteration p > wave k > network | wave_update | checkpoint | record | decode

- encode, decode: the pipeline's own code before and after its loop.
- trace: the one turn of the pipeline's loop that is recorded. Of a loop that is driven it is the first turn, and holds
  the network call of the first wave.
- plan: choosing what to run, with the network calls that measure what they cost, and making its tables and memory.
- iteration p: the waves up to checkpoint p; of SRDS, 0 is the coarse sweep. A method whose window slides has one, and
  its checkpoint tells the sweeps. A run that begins anew counts from the start again: after a callback that changed
  something, or in the place of one that did not settle.
- wave k: its category is "coarse", "fine" or "mixed", its payload the number of rows.
- network: one call; payload: rows. Where coarse rows run beside the others, the wave has a range for each, "coarse" and
  "fine", around its call.
- wave_update: the solver's work between two network calls, whatever the method. One more comes before the first wave.
- checkpoint: the decision to stop; waits for the device.
- record: graphs are recorded, for later calls or for the rest of this one. The ranges in it are those of the waves that
  are recorded.
- stock: the pipeline's own loop, in the place of all others, where a call cannot be accelerated.

A replay of a graph runs nothing in Python: there an iteration holds "replay p" for every launch, with the number of its
waves as payload, and "checkpoint". Where what comes next is launched before the decision to stop, the first replay of
an iteration lies in the range of the one before. Which node of a graph belongs to which wave, and whether to its coarse
rows, the ranges in "record" tell: a node was made in them (`profiling/report.py` follows that).

While nobody looks, what a wave pays is asking `active`.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from .errors import InvalidArgument
from .ranges import Call, Domain, Span, Sums, Waves, iteration_at, of_wave
from .solvers.program import Program
from .trace import Trace

VARIABLE = "SRDS_FAST_PROFILE"
RANGES = ("1", "true", "on", "yes", "nvtx")
NOTHING = ("", "0", "false", "off", "no")

logger = logging.getLogger("srds_fast")

active = False
"""Whether any thread may be in a call that is looked at: what is asked in every wave."""


class _Watchers:
    """Who looks, and at how many calls.

    Attributes:
        count: who look now.
        domain: made by the first.
        traces: of those who keep one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = self.count = 0
        self.domain: Domain | None = None
        self.traces: tuple[Trace, ...] = ()

    def add(self, trace: Trace | None) -> None:
        with self._lock:
            self.domain = self.domain or Domain()
            self.traces += () if trace is None else (trace,)
            self.count += 1
            self._tell()

    def remove(self, trace: Trace | None) -> None:
        with self._lock:
            self.traces = tuple(each for each in self.traces if each is not trace)
            self.count -= 1
            self._tell()

    def calls(self, more: int) -> None:
        """A call begins that is looked at (1), or ends (-1): to its end, whoever leaves meanwhile."""
        with self._lock:
            self._calls += more
            self._tell()

    def _tell(self) -> None:
        global active
        active = self.count > 0 or self._calls > 0


class _Calls(threading.local):
    """The calls that a thread is in and that are looked at, outermost first."""

    def __init__(self) -> None:
        self.open: list[Call] = []


_watchers = _Watchers()
_calls = _Calls()


@contextmanager
def profile(trace: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Show what calls do that begin while this is open, in all threads.

    Ranges go to NVTX, domain "srds_fast", for Nsight; `report.timeline` holds their sums. Without a tool that listens
    to NVTX a range takes about three microseconds. The description of `srds_fast.telemetry` has their names.

    Args:
        trace: a file to write at the end, in Chrome's format, for Perfetto or chrome://tracing: all ranges of calls
            that have ended by then, with times of the host and, on a CUDA device, times of the device by events. These
            are read when a call has ended, which then waits for its device; leave the file out under Nsight. "{pid}" in
            its name is the number of the process: several would overwrite each other's.

    Raises:
        InvalidArgument: the file cannot be written, as its folder is not there.
    """
    kept = None if trace is None else _trace_to(Path(str(trace).replace("{pid}", str(os.getpid()))))
    _watchers.add(kept)
    try:
        yield
    except BaseException:
        _watchers.remove(kept)
        try:
            _write(kept)
        except OSError as why:  # what went wrong before says more
            logger.warning("The trace was not written: %s", why)
        raise
    _watchers.remove(kept)
    _write(kept)


def profile_as(setting: str) -> AbstractContextManager[None]:
    """`profile` as a word: of the environment variable, and of the command line.

    Args:
        setting: one of `RANGES`, for these alone; one of `NOTHING`; else the file to write.
    """
    if setting.lower() in NOTHING:
        return nullcontext()
    return profile(None if setting.lower() in RANGES else setting)


def _trace_to(path: Path) -> Trace:
    if path.is_dir() or not path.parent.is_dir():
        raise InvalidArgument(
            f"{path} cannot be written: {'it is a folder' if path.is_dir() else f'there is no folder {path.parent}'}. "
            "A trace is one file. Give its name in a folder that is there."
        )
    return Trace(path)


def _write(trace: Trace | None) -> None:
    if trace is not None:
        trace.write()


class Timeline:
    """Filled when a call has ended.

    Attributes:
        sums: see `Report.timeline`; None where nobody looked.
    """

    sums: Sums | None = None


@contextmanager
def call(what: str, device: Callable[[], Any], timeline: Timeline) -> Iterator[None]:
    """A call of this thread; what: is called; device: of its network, asked if needed; timeline: filled at the end."""
    domain = _watchers.domain
    if not _watchers.count or domain is None:
        yield
        return
    begun = Call(what, domain, _watchers.traces, device)
    _watchers.calls(1)
    _calls.open.append(begun)
    try:
        yield
    finally:
        _calls.open.remove(begun)
        _watchers.calls(-1)
        timeline.sums = begun.end()


@contextmanager
def unseen() -> Iterator[None]:
    """What this thread does within has no ranges: it is no part of a call, and is timed."""
    calls, _calls.open = _calls.open, []
    try:
        yield
    finally:
        _calls.open = calls


_OFF: AbstractContextManager[None] = nullcontext()


def span(name: str, category: str, payload: int | None = None) -> AbstractContextManager[None]:
    """A range of the call that this thread makes; nothing outside of calls, and where nobody looks."""
    return Span(_calls.open[-1], name, category, payload) if active and _calls.open else _OFF


def wave(program: Program, number: int) -> AbstractContextManager[None]:
    """The range of a wave that is recorded."""
    return Span(_calls.open[-1], *of_wave(program, number)) if active and _calls.open else _OFF


def iteration(program: Program, checkpoints: int) -> AbstractContextManager[None]:
    """The range of an iteration that is recorded: of what comes after so many checkpoints."""
    number = iteration_at(program, checkpoints)
    return span(f"iteration {number}", "iteration", number)


def replay(program: Program, checkpoints: int, waves: int) -> AbstractContextManager[None]:
    """The range of one launch of so many waves, of what comes after so many checkpoints."""
    return span(f"replay {iteration_at(program, checkpoints)}", "replay", waves)


def recording() -> AbstractContextManager[None]:
    """The range of what is recorded, in a call that may be at it or in the middle of a replay."""
    return Span(_calls.open[-1], "record", "record") if _calls.open and _calls.open[-1].at != "record" else _OFF


def phase(name: str) -> None:
    """What the call of this thread comes to now: encode, trace, plan, record, decode or stock."""
    if active and _calls.open:
        _calls.open[-1].phase(name)


def waves_of(program: Program) -> Waves | None:
    """The ranges of a run that the call of this thread makes; None where nobody looks."""
    return Waves(_calls.open[-1], program) if active and _calls.open else None


def _as_the_environment_says() -> None:
    """Look from now on until the process exits, as its environment asks; a file is written at a clean exit."""
    watching = ExitStack()
    watching.enter_context(profile_as(os.environ.get(VARIABLE, "")))
    atexit.register(watching.close)


_as_the_environment_says()
