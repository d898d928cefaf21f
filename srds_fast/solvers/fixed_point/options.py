"""Options of the fixed-point methods: ParaTAA and ParaDiGMS."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from torch import Tensor

from ...schedulers.table import NoiseTable
from ..contract import Core, SolverInputs
from ..convergence import SWEEPS, Contraction
from ..method import Method, Stopping, Target
from ..program import Program
from .parameters import Parameters
from .program import Sweeps, fixed_point, windows
from .solver import fixed_point as solve

# of a run that has not settled: by then it has cost several times as much as the sequential sampler
MOST_SWEEPS = 100
HALF_A_GREY_LEVEL = 4e-3
# sweeps after which a tolerance of half a grey level mostly stops a run, and by what factor one more reduces the error:
# on the digits pipeline, 25 to 100 steps, guidance 1 and 5
EXPECTED_SWEEPS = 8
REDUCED_BY_A_SWEEP = 3.0


@dataclass(frozen=True)
class FixedPoint(Parameters, Method):
    """Options of the methods that refine all points of the grid at once; for the attributes see `Parameters`."""

    name: ClassVar[str] = "fixed-point"
    takes_warm_start: ClassVar[bool] = True
    contraction: ClassVar[Contraction] = SWEEPS
    first_iteration: ClassVar[int] = Sweeps.first_iteration
    seconds_of_a_row: ClassVar[float] = 5e-6  # a wave is one update of all points
    tried: ClassVar[tuple[int, int]] = (4, 14)

    def with_defaults(self, target: Target) -> Self:
        given = self.step_tolerance is not None or self.tolerance is not None
        # nothing is tolerated in bitwise runs
        return self if self.window is None or given or target.bitwise else replace(self, tolerance=target.tolerance)

    def most_iterations(self, target: Target) -> int:
        return target.num_steps if target.bitwise else min(target.num_steps, MOST_SWEEPS)

    def program(self, num_steps: int, max_iterations: int, *, max_rows: int | None, bitwise: bool) -> Program:
        if self.window is not None:
            return windows(num_steps, min(self.window, max_rows or self.window))
        return fixed_point(num_steps, max_iterations)

    def widths(
        self, num_steps: int, iteration: int, max_iterations: int, *, max_rows: int | None, bitwise: bool
    ) -> list[int]:
        if self.window is not None:
            return super().widths(num_steps, iteration, max_iterations, max_rows=max_rows, bitwise=bitwise)
        return [num_steps - number for number in range(iteration)]

    def rows(self, num_steps: int, max_iterations: int) -> int:
        if self.window is not None:
            return num_steps * min(self.window, num_steps)
        return sum(num_steps - number for number in range(max_iterations))

    def core(self, x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs, *, bitwise: bool) -> Core:
        assert isinstance(program, Sweeps)
        return solve(x, noise, program, self, inputs, bitwise=bitwise)

    @property
    def slides(self) -> bool:
        return self.window is not None

    def fused(self, noise: NoiseTable, *, constrained: bool) -> bool:
        return not self.slides and self.order is None and noise.triangles is None

    def iterations_begun(self, num_steps: int, iteration: int, max_iterations: int) -> int:
        return iteration

    def expected_iterations(self, stopping: Stopping) -> tuple[int, ...]:
        more = math.log(HALF_A_GREY_LEVEL / stopping.tolerance) / math.log(REDUCED_BY_A_SWEEP)
        most = stopping.max_iterations
        return (max(min(self.contraction.fewest, most), min(most, EXPECTED_SWEEPS + math.ceil(more))),)

    def words(self) -> list[str]:
        return [f"window {self.window}"] if self.slides else []


@dataclass(frozen=True)
class ParaTAA(FixedPoint):
    """ParaTAA (Tang et al., ICML 2024): every point a row, triangular Anderson acceleration.

    By default c_i is a rotation or less instead of the paper's exact linear part, which amplifies errors; `published`
    has it.
    With a window, a step is finished if the root mean square of its residual is within step_tolerance or within
    step_tolerance * sigma, sigma the standard deviation of DDPM's posterior at the step; the window begins at the first
    step that is not.
    """

    name: ClassVar[str] = "parataa"
    about: ClassVar[str] = "refines and evaluates all points at once"
    slides_by_residuals: ClassVar[bool] = True

    @classmethod
    def published(cls, window: int = 100, order: int | None = None, step_tolerance: float = 1e-3) -> ParaTAA:
        """The authors' form, with the defaults of their command line. order: 20 for Stable Diffusion, full for DiT."""
        return cls(data_std=math.inf, history=1, order=order, window=window, step_tolerance=step_tolerance)

    def candidates(self, target: Target, *, calibrated: bool) -> Iterator[Method]:
        # also where steps add noise: a wave knows the noise of all steps, so it converges as fast as without
        if target.leaves_choice:
            yield self


@dataclass(frozen=True)
class ParaDiGMS(FixedPoint):
    """ParaDiGMS (Shih et al., NeurIPS 2023): Picard iteration on a sliding window.

    A step is finished if its point moved little enough; the window slides to the point after the last that did, as long
    as all before it did. By default the bounds follow from the tolerance of the call (`sliding.shared_bounds`). With
    step_tolerance, as published, the mean square of the movement must be within step_tolerance^2 times the variance of
    DDPM's posterior there, which says little of the sample.
    """

    name: ClassVar[str] = "paradigms"
    about: ClassVar[str] = "Picard iteration on a sliding window of 10"
    data_std: float | Literal["auto"] | None = None
    history: int = 0
    window: int | None = 10

    @classmethod
    def published(cls, window: int = 10, step_tolerance: float = 0.1) -> ParaDiGMS:
        """The authors' form, with the defaults of diffusers' pipeline of that name."""
        return cls(window=window, step_tolerance=step_tolerance)
