"""Programs of the fixed-point methods: sweeps over the whole grid, or over a window that slides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from ...caches import cached
from ..program import Boundary, Program, Row, Wave


@dataclass(frozen=True)
class Sweeps(Program):
    """One block; each wave is an iteration that moves all points of a window, from the first that is not exact on."""

    first_iteration: ClassVar[int] = 1  # there is no coarse sweep

    @property
    def exact_iteration(self) -> int:
        return self.num_steps

    @cached_property
    def final_steps(self) -> tuple[int, ...]:
        """As of `Program`: those before the first row of the next sweep, or of the one that a wave is a part of."""
        starts: dict[int, int] = {}
        for wave in self.waves:
            starts.setdefault(wave.rows[0].iteration, wave.rows[0].position)
        return (*(starts[wave.rows[0].iteration] for wave in self.waves[1:]), self.num_steps)


@cached
def fixed_point(num_steps: int, num_iterations: int) -> Sweeps:
    """Sweeps over the whole grid: ParaTAA with a full window. Every point that is not exact is a row.

    After wave k the points 0 .. k + 1 are exact, and leave the program: N waves are the sequential sampler.
    """
    waves = tuple(_sweep(number, tuple(range(number, num_steps))) for number in range(num_iterations))
    return Sweeps(num_steps, (0, num_steps), num_iterations, waves)


@cached
def windows(num_steps: int, window: int) -> Sweeps:
    """Sweeps over a window of steps that slides by the values found (ParaDiGMS, ParaTAA); at the slowest, by one step.

    Wave i is the window that begins at step i. A run that slides further leaves waves out. The sample is complete after
    the last.
    """
    waves = [_sweep(start, tuple(range(start, min(start + window, num_steps)))) for start in range(num_steps)]
    waves[:-1] = [Wave(wave.rows, ()) for wave in waves[:-1]]
    return Sweeps(num_steps, (0, num_steps), num_steps, tuple(waves))


def of_widths(num_steps: int, widths: Sequence[int]) -> Sweeps:
    """A wave for each number of rows, spread over the grid: to measure what network calls cost."""
    waves = []
    for number, width in enumerate(widths):
        waves.append(_sweep(number, tuple(sorted(index * num_steps // width for index in range(width)))))
    return Sweeps(num_steps, (0, num_steps), len(waves), tuple(waves))


def _sweep(number: int, positions: tuple[int, ...]) -> Wave:
    rows = tuple(Row(number, 0, position, position, coarse=False, fine=True) for position in positions)
    return Wave(rows, (Boundary(number + 1, 1),))
