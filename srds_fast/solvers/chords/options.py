"""Options of CHORDS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Self

from torch import Tensor

from ...errors import InvalidArgument
from ...schedulers.table import NoiseTable
from ..contract import Core, SolverInputs
from ..method import Method, Target
from ..program import Program
from . import program as programs
from .solver import chords

# numbers of cores that the planner compares
PLANNED = (4, 8)


@dataclass(frozen=True)
class Chords(Method):
    """CHORDS (Han et al., ICCV 2025): cores that start further and further along, the slower rectify the faster.

    Attributes:
        num_cores: rows of a wave, at most. 1 is the sequential sampler.
        starts: steps at which the cores begin, ascending from 0; None: as the paper spaces them.
    """

    name: ClassVar[str] = "chords"
    about: ClassVar[str] = "four cores, each of which begins later than the one before"
    num_cores: int = 4
    starts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        cores = self.num_cores
        if isinstance(cores, bool) or not isinstance(cores, int) or cores < 1:
            raise InvalidArgument(f"Chords: num_cores is {cores!r}. It must be a whole number, 1 or more. Pass one.")
        if self.starts is not None:
            starts = tuple(self.starts)
            object.__setattr__(self, "starts", starts)
            if len(starts) != cores or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
                raise InvalidArgument(
                    f"Chords: starts is {starts}. It must be {cores} steps, ascending, the first 0. Pass such steps."
                )

    def with_defaults(self, target: Target) -> Self:
        steps = target.num_steps
        if self.starts is not None and self.starts[-1] >= steps:
            raise InvalidArgument(
                f"A core begins at step {self.starts[-1]}, and there are {steps} steps. It would have none to take. "
                "Pass other starts, or leave them out."
            )
        return replace(self, num_cores=min(self.num_cores, steps))

    def most_iterations(self, target: Target) -> int:
        return self.num_cores - 1

    def program(self, num_steps: int, max_iterations: int, *, max_rows: int | None, bitwise: bool) -> Program:
        return programs.chords(num_steps, self.starts or programs.chord_starts(num_steps, self.num_cores))

    def core(self, x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs, *, bitwise: bool) -> Core:
        assert isinstance(program, programs.Cores)
        return chords(x, noise, program, inputs)

    @property
    def fits_turns(self) -> bool:
        return True

    def num_checkpoints(self, max_iterations: int) -> int:
        return self.num_cores

    def candidates(self, target: Target, *, calibrated: bool) -> Iterator[Method]:
        # without calibration it has no tolerance to stop by that could be relied on
        if calibrated and target.leaves_choice(calibrated=True):
            yield from (Chords(cores) for cores in PLANNED if cores <= target.num_steps)

    def words(self) -> list[str]:
        return [f"{self.num_cores} cores"]
