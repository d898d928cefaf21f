"""The ranges of one call: told to NVTX and to the torch profiler as they begin and end, and added up."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from . import device_events
from .chrome_trace import running

if TYPE_CHECKING:
    from ..solvers.program import Program

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


@functools.cache
def _domain() -> Any:
    import nvtx

    return nvtx.get_domain(DOMAIN)


def of_wave(program: Program, number: int) -> tuple[str, str, int]:
    """Name, category and payload of a wave."""
    rows = program.waves[number].rows
    coarse, fine = any(row.coarse for row in rows), any(row.fine for row in rows)
    return f"wave {number}", "mixed" if coarse and fine else "coarse" if coarse else "fine", len(rows)


@dataclass(slots=True)
class _Open:
    """A range that has begun.

    Attributes:
        phase: its line of the timeline; None if it is not counted.
        started: on the host's clock, in seconds.
        record: the torch profiler's handle of it; None if no profiler ran.
        event: its start on the device, if the device is timed.
        aside: ranges in it are not counted.
    """

    phase: str | None
    started: float
    record: Any
    event: torch.cuda.Event | None
    aside: bool


@dataclass(slots=True)
class _Total:
    """The total of a phase. pairs: start and end of each of its ranges on the device."""

    count: int = 0
    seconds: float = 0.0
    pairs: list[device_events.Pair] = field(default_factory=list)


class Call:
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
        """Begin a range in the innermost open one. of: what the trace adds to the name."""
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
            # torch.profiler.record_function would be an operation: a graph that is recorded would hold it
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


class Waves:
    """The ranges of a run: its iterations, their waves, and what is done in each.

    Args:
        call: that makes the run.
        program: its waves.
    """

    def __init__(self, call: Call, program: Program) -> None:
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
            self._call.push(*of_wave(self._program, number))

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
