"""The ranges of one call: sent to NVTX and to the torch profiler as they begin and end, and added up by phase."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler as torch_profiler

from ..solvers.contract import Answer, Checkpoint, Core, Evaluate
from ..solvers.program import Program
from ..words import counted
from .watch import follow_environment, watching

DOMAIN = "srds_fast"
COLOURS = {
    "call": 0x7F7F7F, "encode": 0xC7C7C7, "trace": 0x8C564B, "plan": 0xE377C2, "iteration": 0x9467BD,
    "coarse": 0xFF7F0E, "fine": 0x1F77B4, "mixed": 0x2CA02C, "network": 0x17BECF, "wave_update": 0xD62728,
    "checkpoint": 0xBCBD22, "replay": 0x1F77B4, "record": 0xE377C2, "explore": 0x17BECF, "decode": 0xC7C7C7,
    "stock": 0x7F7F7F,
}  # fmt: skip
"""Of ranges in Nsight, by category."""

# network calls in these measure costs or record graphs: they are no waves of the call
_ASIDE = ("plan", "record")
_ON_DEVICE = ("iteration", "coarse", "fine", "mixed", "network", "wave_update", "replay")
_OFF: AbstractContextManager[None] = nullcontext()

Sums = dict[str, dict[str, float | int | None]]

logger = logging.getLogger("srds_fast")


class _Thread(threading.local):
    """The watched calls that a thread is in, outermost first."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []


_thread = _Thread()


class Timeline:
    """The totals of a call, filled at its end: see `Report.timeline`. None where nobody watched."""

    sums: Sums | None = None


@contextmanager
def call(what: str, device: Callable[[], torch.device], timeline: Timeline) -> Iterator[None]:
    """A call of this thread. what: its name in the trace; device: called only if the network's device is timed.

    Raises InvalidArgument where what the environment asks for cannot be had, see `profile`.
    """
    follow_environment()
    if not watching:
        yield
        return
    traces = [trace for trace in watching if trace is not None]
    begun = _Call(what, device() if traces else torch.device("cpu"))
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
    """Within this, the thread has no ranges: what it does is timed, and is no part of the call."""
    calls, _thread.calls = _thread.calls, []
    try:
        yield
    finally:
        _thread.calls = calls


def span(name: str, category: str, payload: int | None = None) -> AbstractContextManager[None]:
    """A range in the watched call that this thread is in; nothing without one."""
    return _thread.calls[-1].span(name, category, payload) if _thread.calls else _OFF


def recording() -> AbstractContextManager[None]:
    """The range of recording, in a call that may be in its phase "record" already, or in the middle of a replay."""
    return _OFF if _thread.calls and _thread.calls[-1].now == "record" else span("record", "record")


def phase(name: str) -> None:
    """The call of this thread begins its next phase: encode, trace, plan, record, explore, decode or stock."""
    if _thread.calls:
        _thread.calls[-1].phase(name, name)


def ranged(core: Core, program: Program, waiting: Callable[[], bool], *, replayed: bool = False) -> Core:
    """A core whose run has ranges in the call of this thread; the core itself where nobody watches.

    waiting: whether the wave that was handed out last has not been run: it is then not counted. replayed: waves are
    launched many at a time, and have no ranges.
    """
    return _ranged(_thread.calls[-1], core, program, waiting, replayed) if _thread.calls else core


def _ranged(call: _Call, core: Core, program: Program, waiting: Callable[[], bool], replayed: bool) -> Core:
    call.phase(f"iteration {program.first_iteration}", "iteration", program.first_iteration)
    event: Evaluate | Checkpoint | None = None
    answer: Answer = None
    try:
        while True:
            if not (replayed or isinstance(event, Checkpoint)):
                call.push("wave_update", "wave_update")
            event = core.send(answer)
            if isinstance(event, Checkpoint):
                call.pop_to(3)
                call.push("checkpoint", "checkpoint", event.iteration)
            elif not replayed:
                call.pop_to(2)
                call.push(*of_wave(program, event.number))
            answer = yield event
            if isinstance(event, Checkpoint):
                call.pause()
                if answer != ():
                    call.phase(f"iteration {event.iteration + 1}", "iteration", event.iteration + 1)
    except StopIteration as stop:
        sample: Tensor = stop.value
        return sample
    finally:
        core.close()
        if call.now == "iteration":
            call.pop_to(2, dropped=waiting())
            call.pause()


def of_wave(program: Program, number: int) -> tuple[str, str, int]:
    """Name, category and payload of a wave."""
    rows = program.waves[number].rows
    coarse, fine = any(row.coarse for row in rows), any(row.fine for row in rows)
    return f"wave {number}", "mixed" if coarse and fine else "coarse" if coarse else "fine", len(rows)


@dataclass(slots=True)
class _Total:
    """The total of a phase, with the events at the start and the end of each range on the device."""

    count: int = 0
    seconds: float = 0.0
    events: list[tuple[Any, Any]] = field(default_factory=list)


class _Call:
    """The ranges of one call, in the thread that makes it: a stack."""

    def __init__(self, what: str, device: torch.device) -> None:
        import nvtx

        self.now = ""  # category of the phase that the call is in
        self._device = device
        self._timed = device.type == "cuda"
        self._dropping = False  # what ends now was not run: it is not counted
        self._nvtx = nvtx.get_domain(DOMAIN)
        self._open: list[Iterator[None]] = []
        self._aside = 0  # how many of the open ranges are: what lies in them is not counted
        self._totals: dict[str, _Total] = {}
        self.push("call", "call", of=what)

    @contextmanager
    def span(self, name: str, category: str, payload: int | None) -> Iterator[None]:
        depth = len(self._open)
        self.push(name, category, payload)
        try:
            yield
        finally:
            self.pop_to(depth)

    def push(self, name: str, category: str, payload: int | None = None, *, of: str = "") -> None:
        """Begin a range in the innermost open one. of: what the trace adds to the name."""
        begun = self._range(name, category, payload, of)
        next(begun)
        self._open.append(begun)

    def pop_to(self, depth: int, *, dropped: bool = False) -> None:
        """End ranges until so many are open. dropped: what they stand for was not run."""
        self._dropping = dropped
        while len(self._open) > depth:
            next(self._open.pop(), None)

    def _range(self, name: str, category: str, payload: int | None, of: str) -> Iterator[None]:
        is_wave = name.startswith("wave ")
        phase = "wave" if is_wave else category
        total = None if self._aside else self._totals.setdefault(phase, _Total())
        self._aside += category in _ASIDE
        attributes = {"message": name, "color": COLOURS[category], "category": category, "payload": payload}
        self._nvtx.push_range(self._nvtx.get_event_attributes(**attributes))
        record = None
        if torch_profiler._is_profiler_enabled:
            of = f"{category}, {counted(payload, 'row')}" if is_wave and payload is not None else of
            # torch.profiler.record_function would be an operation: a graph that is recorded would hold it
            record = torch.autograd._record_function_with_args_enter(f"{name} ({of})" if of else name)
        event = self._event() if self._timed and total is not None and category in _ON_DEVICE else None
        started = time.perf_counter()
        yield
        if total is not None and not self._dropping:
            if event is not None:
                total.events.append((event, self._event()))
            total.count += 1
            total.seconds += time.perf_counter() - started
        if record is not None:
            torch.autograd._record_function_with_args_exit(record)
        self._nvtx.pop_range()
        self._aside -= category in _ASIDE

    def phase(self, name: str, category: str, payload: int | None = None) -> None:
        """End the phase before and begin this one, unless the call is in it already."""
        if not self.now == category == name:
            self.pause()
            self.push(name, category, payload)
            self.now = category

    def pause(self) -> None:
        self.pop_to(1)
        self.now = ""

    def sums(self) -> Sums:
        """Totals by phase, in the order in which they first began, see `Report.timeline`. Waits for the device."""
        return {
            phase: {"count": total.count, "seconds": total.seconds, "device_seconds": self._on_device(total)}
            for phase, total in self._totals.items()
            if total.count
        }

    # A device that has failed is logged and not raised: the call that is timed raises the error itself.

    def _event(self) -> torch.cuda.Event | None:
        """An event in the current stream; None while a graph is captured: such an event has no time."""
        with self._logging():
            if not torch.cuda.is_current_stream_capturing():
                event = torch.cuda.Event(enable_timing=True)
                event.record(torch.cuda.current_stream(self._device))
                return event
        return None

    def _on_device(self, total: _Total) -> float | None:
        known = [(start, end) for start, end in total.events if end is not None]
        with self._logging():
            for _, end in known:
                end.synchronize()
            return 1e-3 * sum(start.elapsed_time(end) for start, end in known) if known else None
        return None

    @contextmanager
    def _logging(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as why:
            logger.warning("The ranges on %s have no device times: %s", self._device, str(why).partition("\n")[0])
