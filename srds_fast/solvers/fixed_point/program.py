"""Programs of the fixed-point methods: sweeps over the whole grid, or over a window that slides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...caches import cached
from ...kernels.common.by_field import ByField
from ..on_demand import OnDemand
from ..program import Boundary, LongProgram, Program, Row, Wave

# A program with more rows than this is made while it runs: all at once, its rows would take about 70 bytes each.
LONG = 2**18


@dataclass(frozen=True)
class Sweeps(Program):
    """One block; each wave is an iteration that moves all points of a window, from the first that is not exact on."""

    first_iteration: ClassVar[int] = 1  # there is no coarse sweep

    @property
    def exact_iteration(self) -> int:
        return self.num_steps

    def _final_steps(self) -> Iterator[int]:
        """Those before the first row of the next sweep, or of the one that a wave is a part of."""
        starts: dict[int, int] = {}
        for number, wave in enumerate(self.waves):
            begin = starts.setdefault(wave.rows[0].iteration, wave.rows[0].position)
            if number:
                yield begin
        yield self.num_steps


@dataclass(frozen=True)
class LongSweeps(Sweeps, LongProgram):
    """Sweeps whose waves are made when a run comes to them."""


def of_sweeps(num_steps: int, widths: Sequence[int], sweep: Callable[[int], Wave]) -> Sweeps:
    """A program of sweeps over the whole grid. widths: rows of each; sweep: makes the one with a number."""
    count = len(widths)
    if sum(widths) <= LONG:
        return Sweeps(num_steps, (0, num_steps), count, tuple(map(sweep, range(count))))
    waves = OnDemand(count, lambda: map(sweep, range(count)))
    return LongSweeps(num_steps, (0, num_steps), count, waves, tuple(widths))


@cached
def fixed_point(num_steps: int, num_iterations: int) -> Sweeps:
    """Sweeps over the whole grid: ParaTAA with a full window. Every point that is not exact is a row.

    After wave k the points 0 .. k + 1 are exact, and leave the program: N waves are the sequential sampler.
    """
    widths = [num_steps - number for number in range(num_iterations)]
    return of_sweeps(num_steps, widths, lambda number: sweep(number, range(number, num_steps)))


@cached
def windows(num_steps: int, window: int) -> Sweeps:
    """Sweeps over a window of steps that slides by the values found (ParaDiGMS, ParaTAA); at the slowest, by one step.

    Wave i is the window that begins at step i. A run that slides further leaves waves out. The sample is complete after
    the last.
    """
    waves = [sweep(start, range(start, min(start + window, num_steps))) for start in range(num_steps)]
    waves[:-1] = [Wave(wave.rows, ()) for wave in waves[:-1]]
    return Sweeps(num_steps, (0, num_steps), num_steps, tuple(waves))


def of_widths(num_steps: int, widths: Sequence[int]) -> Sweeps:
    """A wave for each number of rows, spread over the grid: to measure what network calls cost."""
    waves = []
    for number, width in enumerate(widths):
        waves.append(sweep(number, sorted(index * num_steps // width for index in range(width))))
    return Sweeps(num_steps, (0, num_steps), len(waves), tuple(waves))


def sweep(number: int, positions: Iterable[int]) -> Wave:
    """The sweep with a number, which asks at these positions."""
    at = tuple(positions)
    count = len(at)
    rows = ByField(Row, ([number] * count, [0] * count, at, at, [False] * count, [True] * count))
    return Wave(rows, (Boundary(number + 1, 1),))
