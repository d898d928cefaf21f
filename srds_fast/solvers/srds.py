"""SRDS, Self-Refining Diffusion Samplers (Selvam, Merchant, Ermon, NeurIPS 2024): Parareal in time.

    x_{i+1}^p = F(x_i^{p-1}) + ( G(x_i^p) - G(x_i^{p-1}) )

F are the fine steps of a block, G one jump across it. The bracket is computed first: it is bitwise zero once its two
terms agree, and F's result is then returned untouched. Boundary i is the sequential one from iteration i on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast

from torch import Tensor

from ..errors import InvalidArgument
from ..schedulers.steps import COARSE_SOLVERS, CoarseSolver
from ..schedulers.table import NoiseTable
from ..words import counted
from . import program as programs
from .ahead import BOUNDARIES, CAUTION, SMALLEST
from .checks import check_one_of, check_switch, check_whole
from .compiled import Form
from .contract import NO_INPUTS, Core, SolverInputs
from .convergence import estimated_error
from .method import Method, Seen, Stopping, Target
from .program import LongProgram, Program
from .wave_table import compiled, stages
from .waves import run

# with fewer steps a second iteration already costs as many waves as the sequential sampler
FEWEST_STEPS = 6
# numbers of blocks that the planner compares, as shares of the default
SHARES = (0.5, 0.7, 1.4, 2.0)
# More for several ranks: a wave costs as many rows as the busiest of them has, which jumps where a wave has a row more
# than there are ranks. With all numbers of blocks the best plan for 2 to 16 ranks is faster by 7 %, in the mean over 20
# to 100 steps and one or two units a row; with these it is by 2 %.
SHARES_OF_RANKS = (0.65, 0.75, 0.85, 1.1, 1.25, 1.5, 1.75, 2.2)
# with more steps it takes the host too long to price so many plans
FEW_STEPS = 256
# iterations in flight that it compares, where rows cost something; None: as many as there are
IN_FLIGHT = (1, 2, None)
# The first change of a run falls with the square of the number of blocks (2M jumps; with the number itself where jumps
# are of first order), so that a run with some blocks tells of runs with others. Digits, guidance 5, times B^2: 1.9 to
# 2.1 for 6 to 12 blocks of 25 steps, 3.4 to 4.2 for 8 to 17 blocks of 50.
ORDER = {"2m": 2, "ddim": 1}
# the first change of N steps in B blocks is about this times N / B^2 (fewer than N / 2 blocks: digits 0.06 to 0.08, a
# mixture of Gaussians 0.09 to 0.2), and of B blocks with first-order jumps about this times 1 / B
FIRST_CHANGE = {"2m": 0.1, "ddim": 0.65}
# about how far samples lie apart in it
SPREAD = (0.6, 1.0, 1.7)
# a further change is about this share of the one before
SHRINKS = 0.1


@dataclass(frozen=True)
class SRDS(Method):
    """SRDS (Selvam et al., NeurIPS 2024): steps in blocks, Parareal iterations that overlap.

    Attributes:
        num_blocks: B, blocks the steps are cut into. None: blocks of about sqrt(N) / 2 steps. Pipelined, iteration p is
            ready after p * S + B - p waves, so for the one or two iterations that the 2M jump needs, more and shorter
            blocks than the paper's sqrt(N) are better on both counts: fewer waves and a closer coarse sweep.
        coarse_solver: "2m" (DPM-Solver++(2M) jump), "ddim" (first order) or "auto": 2m, but ddim where steps add noise.
            There x0 follows no line, and first-order jumps are several times closer after one iteration.
        pipelined: start rows of the next iteration as soon as their input exists.
        in_flight: iterations under way at once: rows of iteration p wait for the sample of iteration p - in_flight,
            which may be enough. None: no bound.
    """

    name: ClassVar[str] = "srds"
    about: ClassVar[str] = "SRDS with our defaults: 2m jumps, more blocks"
    advice: ClassVar[str] = "pass another method, or coarse_solver='ddim' or more blocks for srds"
    weight: ClassVar[int] = 2  # less than for others: a run also tells by how far it stopped in time
    scales: ClassVar[bool] = True
    learns_first_stop: ClassVar[bool] = True
    num_blocks: int | None = None
    coarse_solver: CoarseSolver | Literal["auto"] = "auto"
    pipelined: bool = True
    in_flight: int | None = None

    def __post_init__(self) -> None:
        check_one_of("coarse_solver", self.coarse_solver, ("auto", *COARSE_SOLVERS))
        check_whole("num_blocks", self.num_blocks, 1, optional=True)
        check_whole("in_flight", self.in_flight, 1, optional=True)
        check_switch("pipelined", self.pipelined)
        if not self.pipelined:
            self._refuse_in_flight("pipelined=False")

    @classmethod
    def published(cls, num_steps: int) -> SRDS:
        """The form of the paper: sqrt(N) blocks and first-order jumps."""
        return cls(num_blocks=max(1, round(math.sqrt(num_steps))), coarse_solver="ddim")

    def _refuse_in_flight(self, beside: str) -> None:
        if self.in_flight is not None:
            raise InvalidArgument(
                f"in_flight={self.in_flight!r} was given together with {beside}. It limits how many "
                "iterations overlap, because the earlier ones may be enough. Leave one of the two out."
            )

    def check(self, target: Target) -> None:
        if target.exact:
            self._refuse_in_flight("exact=True")

    def with_defaults(self, target: Target) -> Self:
        steps = target.num_steps
        blocks = self.num_blocks or max(1, round(steps / max(2, round(math.sqrt(steps) / 2))))
        if blocks > steps:
            raise InvalidArgument(
                f"num_blocks is {blocks} for {counted(steps, 'step')}. A block holds at least one step. "
                f"Pass at most {steps}, or leave it out."
            )
        solver = self.coarse_solver
        if solver == "auto":
            solver = "ddim" if target.stochastic else "2m"
        return replace(self, num_blocks=blocks, coarse_solver=solver)

    def most_iterations(self, target: Target) -> int:
        return self._blocks

    def program(self, num_steps: int, max_iterations: int, *, max_rows: int | None, bitwise: bool) -> Program:
        return programs.srds(num_steps, self._blocks, max_iterations, self.pipelined, in_flight=self.in_flight)

    def widths(
        self, num_steps: int, iteration: int, max_iterations: int, *, max_rows: int | None, bitwise: bool
    ) -> list[int]:
        ways = self.pipelined, self.in_flight
        return programs.srds_widths(num_steps, self._blocks, max_iterations, *ways, iteration)

    def rows(self, num_steps: int, max_iterations: int) -> int:
        return programs.srds_rows(num_steps, self._blocks, max_iterations)

    def core(self, x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs, *, bitwise: bool) -> Core:
        return srds(x, noise, program, cast(CoarseSolver, self.coarse_solver), inputs, bitwise=bitwise)

    def reported(self) -> dict[str, Any]:
        return self.to_dict()

    def candidates(self, target: Target, *, calibrated: bool) -> Iterator[Method]:
        usual = self.with_defaults(target)._blocks
        blocks = {usual}
        if self.num_blocks is None:
            blocks |= {round(usual * share) for share in SHARES}
            if target.ranks > 1 and target.num_steps <= FEW_STEPS:
                blocks |= {round(usual * share) for share in SHARES_OF_RANKS}
        most = usual if target.max_iterations is None else min(usual, target.max_iterations)
        # iterations that are known to be needed begin as soon as they can
        holds_back = self.pipelined and most > 1 and not (target.bitwise or calibrated)
        for num_blocks in sorted(blocks & set(range(2, target.num_steps + 1)) | {usual}):
            for in_flight in IN_FLIGHT if holds_back and self.in_flight is None else (self.in_flight,):
                yield replace(self, num_blocks=num_blocks, in_flight=in_flight)

    def iterations_begun(self, num_steps: int, iteration: int, max_iterations: int) -> int:
        begun = iteration
        if self.in_flight is not None:
            begun += self.in_flight - 1
        elif self.pipelined:  # in the waves until then, and none before the steps that lead to its first block
            blocks = self._blocks
            begun = (iteration * math.ceil(num_steps / blocks) + blocks - iteration) // (num_steps // blocks) + 1
        return min(max_iterations, begun)

    def expected_iterations(self, stopping: Stopping) -> tuple[int, ...]:
        first = FIRST_CHANGE[self.coarse_solver] / self._blocks ** ORDER[self.coarse_solver]
        if self.coarse_solver == "2m":
            first *= stopping.num_steps
        ahead = self._looks_ahead(stopping.num_steps)
        return tuple(_stops([scale * first], stopping, ahead) for scale in SPREAD)

    def iterations_from(self, seen: Seen, stopping: Stopping) -> int | None:
        theirs = seen.options
        if not isinstance(theirs, SRDS) or theirs.coarse_solver != self.coarse_solver:
            return None
        if seen.num_steps != stopping.num_steps:
            return None
        ratio = theirs._blocks / self._blocks
        scale = ratio ** ORDER[self.coarse_solver]
        # first-order jumps correct each other by as much less as there are fewer of them
        further = ratio if self.coarse_solver == "ddim" else 1.0
        ahead = self._looks_ahead(stopping.num_steps)
        return max(
            _stops(
                [scale * further**number * change for number, change in enumerate(changes)],
                stopping,
                ahead and (ratio != 1.0 or len(changes) == 1),  # else it has looked, and gone on
            )
            for changes in seen.changes
        )

    def same_iterations(self) -> Self:
        return replace(self, in_flight=None)

    def words(self) -> list[str]:
        held = [] if self.in_flight is None else [f"{self.in_flight} in flight"]
        return [f"{counted(self._blocks, 'block')}, {self.coarse_solver} jumps", *held]

    def details(self) -> list[str]:
        return [counted(self._blocks, "block"), f"coarse solver {self.coarse_solver}"]

    def notes(self, max_iterations: int) -> list[str]:
        if self.in_flight is not None and max_iterations > self.in_flight:
            ones = counted(self.in_flight, "iteration")
            return [f"({ones} in flight: later ones begin when those before were not enough)"]
        if self.pipelined and max_iterations > 1:
            return ["(rows begun for later iterations included: fewer with a smaller max_iterations or in_flight)"]
        return []

    def _looks_ahead(self, num_steps: int) -> bool:
        """Whether a run may stop after iteration 1 by what iteration 2 says of it; about where `watched` finds any."""
        passed = self._blocks + 1 - math.ceil(num_steps / self._blocks)
        return self.pipelined and self.in_flight != 1 and BOUNDARIES < passed < self._blocks

    @property
    def _blocks(self) -> int:
        assert self.num_blocks is not None, "with_defaults fills it in"
        return self.num_blocks


def _stops(changes: list[float], stopping: Stopping, ahead: bool) -> int:
    """The iteration after which a sample stops; changes that were not seen shrink as the last ones did.

    ahead: the first change may be enough, if the next iteration says so.
    """
    contraction = stopping.contraction
    shrinks = changes[-1] / changes[-2] if len(changes) > 1 and changes[-2] else SHRINKS
    for iteration in range(1, stopping.max_iterations):
        if len(changes) < iteration:
            changes.append(changes[-1] * shrinks)
        ratio = max(SMALLEST, CAUTION * shrinks) if ahead else 1.0
        if estimated_error(changes[:iteration], contraction, ratio=ratio) <= stopping.tolerance:
            return iteration
    return stopping.max_iterations


def srds(
    x: Tensor,
    noise: NoiseTable,
    program: Program,
    coarse_solver: CoarseSolver = "2m",
    inputs: SolverInputs = NO_INPUTS,
    *,
    bitwise: bool = False,
) -> Core:
    """Run an SRDS program: a checkpoint after every iteration.

    Multistep fine steps look back at the x0 of the step before, so the state at a boundary is (x, that x0). Both get
    the same correction; for the second, the coarse solver has the x0 at the boundary before.
    """
    given = coarse_solver, Form.of(x, inputs, bitwise)
    if isinstance(program, LongProgram):
        return (yield from run(x, program, stages(noise, program, *given), inputs))
    return (yield from run(x, program, [compiled(noise, program, *given)], inputs))
