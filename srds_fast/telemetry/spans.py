"""The functions that other rooms call where a range begins. `srds_fast.telemetry` describes the ranges."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from .ranges import Call, Sums, Waves, of_wave
from .watch import follow_environment, looking

if TYPE_CHECKING:
    from ..solvers.program import Program


class _Thread(threading.local):
    """The watched calls that a thread is in, outermost first."""

    def __init__(self) -> None:
        self.calls: list[Call] = []


_thread = _Thread()
_OFF: AbstractContextManager[None] = nullcontext()


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
        device: gives the device of its network; called only if that is timed.
        timeline: filled at the end.

    Raises:
        InvalidArgument: what the environment asks for cannot be had, see `profile`.
    """
    follow_environment()
    if not looking:
        yield
        return
    traces = [trace for trace in looking if trace is not None]
    on = device() if traces else None
    begun = Call(what, on if on is not None and on.type == "cuda" else None)
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
    calls = _thread.calls
    return calls[-1].span(name, category, payload) if calls else _OFF


def wave(program: Program, number: int) -> AbstractContextManager[None]:
    """The range of a wave that is recorded."""
    return span(*of_wave(program, number)) if _thread.calls else _OFF


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


def waves_of(program: Program) -> Waves | None:
    """The ranges of a run in the call of this thread; None where nobody looks."""
    return Waves(_thread.calls[-1], program) if _thread.calls else None
