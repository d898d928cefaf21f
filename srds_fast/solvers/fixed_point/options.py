"""Options of the fixed-point methods: collocation, ParaTAA and ParaDiGMS."""

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
from .program import FEWEST_NODES, Sweeps, fixed_point, windows
from .solver import fixed_point as solve

# of a run that has not settled: by then it has cost several times as much as the sequential sampler
MOST_SWEEPS = 100
HALF_A_GREY_LEVEL = 4e-3
# sweeps after which a tolerance of half a grey level mostly stops a run, and by what factor one more reduces the error:
# on the digits pipeline, 25 to 100 steps, guidance 1 and 5
EXPECTED_SWEEPS = 8
REDUCED_BY_A_SWEEP = 3.0
# nodes of collocation at this tolerance
NODES = 24
FEWEST_BY_TOLERANCE = 12
# nodes that the planner compares, as shares of the default; fewer only where they are calibrated, as how many sweeps
# they need differs from network to network
SHARES = (0.5, 0.67, 0.83, 1.0, 1.33)


@dataclass(frozen=True)
class FixedPoint(Parameters, Method):
    """Options of the methods that refine all points of the grid at once; for the attributes see `Parameters`."""

    name: ClassVar[str] = "fixed-point"
    takes_warm_start: ClassVar[bool] = True
    first_iteration: ClassVar[int] = Sweeps.first_iteration
    tried: ClassVar[tuple[int, int]] = (4, 14)

    def most_iterations(self, target: Target) -> int:
        return target.num_steps if target.bitwise else min(target.num_steps, MOST_SWEEPS)

    def program(self, num_steps: int, max_iterations: int, *, max_rows: int | None, bitwise: bool) -> Program:
        if self.window is not None:
            return windows(num_steps, min(self.window, max_rows or self.window))
        return fixed_point(num_steps, max_iterations, None if bitwise else self.num_nodes)

    def core(self, x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs, *, bitwise: bool) -> Core:
        assert isinstance(program, Sweeps)
        return solve(x, noise, program, self, inputs, bitwise=bitwise)

    @property
    def slides(self) -> bool:
        return self.window is not None

    @property
    def fused(self) -> bool:
        return not self.slides and self.order is None

    def contraction(self, *, plain: bool) -> Contraction:
        return SWEEPS

    def iterations_begun(self, num_steps: int, iteration: int, max_iterations: int) -> int:
        return iteration

    def expected_iterations(self, stopping: Stopping) -> tuple[int, ...]:
        more = math.log(HALF_A_GREY_LEVEL / stopping.tolerance) / math.log(REDUCED_BY_A_SWEEP)
        most = stopping.max_iterations
        return (max(min(3, most), min(most, EXPECTED_SWEEPS + math.ceil(more))),)

    def words(self) -> list[str]:
        return [f"window {self.window}"] if self.slides else []


@dataclass(frozen=True)
class Collocation(FixedPoint):
    """Fixed-point sweeps that evaluate few nodes of the grid a wave and interpolate the network's output between them.

    Along a sampler of many steps the output is a smooth curve: a few of its points tell the others, whatever N. Every
    wave takes other nodes than the one before, and what was evaluated earlier is corrected by what is learnt at the
    nodes: so the limit is the N-step sampler, not an interpolation of it.
    """

    name: ClassVar[str] = "collocation"
    about: ClassVar[str] = "refines all points at once, evaluates few nodes per wave"
    interpolates: ClassVar[bool] = True

    def with_defaults(self, target: Target) -> Self:
        if self.num_nodes is not None or target.bitwise:
            return self
        # The error of interpolation falls with the square of the number of nodes: on the digits pipeline 24 leave about
        # a quarter of the default tolerance at most.
        asked = round(NODES * math.sqrt(HALF_A_GREY_LEVEL / target.tolerance))
        return replace(self, num_nodes=max(FEWEST_BY_TOLERANCE, asked))

    def candidates(self, target: Target, *, calibrated: bool) -> Iterator[Method]:
        if not target.leaves_choice(calibrated=calibrated):
            return
        usual = self.with_defaults(target).num_nodes
        assert usual is not None
        for share in SHARES:
            num_nodes = max(FEWEST_NODES, round(share * usual))
            if num_nodes < target.num_steps and (calibrated or share >= 1.0):
                yield replace(self, num_nodes=num_nodes)

    def words(self) -> list[str]:
        return [f"{self.num_nodes or 'all'} nodes"]


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
        if target.leaves_choice(calibrated=calibrated):
            yield self


@dataclass(frozen=True)
class ParaDiGMS(FixedPoint):
    """ParaDiGMS (Shih et al., NeurIPS 2023): Picard iteration on a sliding window.

    A step is finished if the mean square of what its point moved by is within step_tolerance^2 times the variance of
    DDPM's posterior there; the window slides to the point after the last that is, as long as all before it are.
    """

    name: ClassVar[str] = "paradigms"
    about: ClassVar[str] = "Picard iteration on a sliding window of 10"
    data_std: float | Literal["auto"] | None = None
    history: int = 0
    window: int | None = 10
    step_tolerance: float | None = 0.1
