"""Options of collocation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from ...schedulers.steps import TensorSpec
from ...schedulers.table import NoiseTable
from ...words import counted
from ..checks import check_positive, check_whole
from ..contract import Core, SolverInputs
from ..convergence import SECANTS, Contraction
from ..fixed_point.program import Sweeps
from ..method import Method, Stopping, Target
from ..program import Program
from .nodes import FEWEST_NODES, secant_sweeps, skeleton
from .solver import collocation
from .table import secant_table

MOST_HISTORY = 5
# of a run that has not settled: by then it has cost several times as much as the sequential sampler
MOST_SWEEPS = 100
HALF_A_GREY_LEVEL = 4e-3
# Sweeps after which a tolerance of half a grey level mostly stops a run, and by what factor one more reduces the error:
# on the digits pipeline, 25 to 100 steps, guidance 1 and 5, and on a robot policy.
EXPECTED_SWEEPS = 7
# the same where steps add noise, on the policy and on mixtures of Gaussians
EXPECTED_WITH_NOISE = 11
REDUCED_BY_A_SWEEP = 3.0
# What the planner compares besides the default where iterations are measured: smooth networks need no visit of every
# point, nor more nodes for more steps. Where a tolerance stops the run, the doubt about what was never asked outweighs
# the rows that are saved.
COVERS, NODES_OF_SMOOTH = (2, 3), 18


@dataclass(frozen=True)
class Collocation(Method):
    """Secant sweeps over all points of the grid; the network is asked at few nodes a wave, and at every point once.

    Along a sampler of many steps the network's output is a smooth curve, and a rough one that hardly changes from wave
    to wave. A skeleton of nodes, the same in every wave, sees the first and carries it to all points
    by cubic interpolation; the second is known once each point has been asked. Between two waves, every point moves
    with the change of the one before it, through its step and through what the output is expected to answer: for
    Gaussian data, corrected by secants of the point's own movements.

    Attributes:
        num_nodes: of the skeleton, about. None: as many as the number of steps asks for, 18 at N = 50, 28 at N = 100.
        cover: ask at every point besides the skeleton (1), at every second (2), and so on; None: at none. What is not
            asked is interpolated, and the estimated error counts what that leaves.
        data_std: standard deviation of the data that expected responses are exact for, if they are Gaussian. "auto":
            0.6; 0.3 times the bound where the scheduler clips x0.
        history: movements of a point that secants go through, 0 to 5; 0: none.
        regularisation: of the secants, relative to the largest squared movement.
    """

    name: ClassVar[str] = "collocation"
    about: ClassVar[str] = "refines all points at once, asks at few nodes a wave and at every point once"
    takes_warm_start: ClassVar[bool] = True
    contraction: ClassVar[Contraction] = SECANTS
    first_iteration: ClassVar[int] = Sweeps.first_iteration
    seconds_of_a_row: ClassVar[float] = 5e-6  # a wave is one update of all points
    tried: ClassVar[tuple[int, int]] = (4, 12)
    num_nodes: int | None = None
    cover: int | None = 1
    data_std: float | Literal["auto"] = "auto"
    history: int = 2
    regularisation: float = 1e-3

    def __post_init__(self) -> None:
        check_whole("num_nodes", self.num_nodes, FEWEST_NODES, optional=True)
        check_whole("cover", self.cover, 1, optional=True)
        check_whole("history", self.history, 0, MOST_HISTORY)
        check_positive("regularisation", self.regularisation)
        check_positive("data_std", self.data_std, infinite=True, word="auto")

    def most_iterations(self, target: Target) -> int:
        return target.num_steps if target.bitwise else min(target.num_steps, MOST_SWEEPS)

    def program(self, num_steps: int, max_iterations: int, *, max_rows: int | None, bitwise: bool) -> Program:
        return secant_sweeps(num_steps, max_iterations, self.num_nodes, self.cover)

    def core(self, x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs, *, bitwise: bool) -> Core:
        assert isinstance(program, Sweeps)
        how = self.data_std, self.history, self.regularisation
        table = secant_table(noise, program, *how, TensorSpec.of(x), scaled=inputs.scaled)
        return collocation(x, noise, program, table, inputs, bitwise=bitwise)

    def fused(self, noise: NoiseTable, *, constrained: bool) -> bool:
        return not constrained and noise.triangles is None

    def candidates(self, target: Target, *, calibrated: bool) -> Iterator[Method]:
        if not target.leaves_choice:
            return
        yield self
        if calibrated:
            yield from (replace(self, cover=every) for every in COVERS)
            if len(skeleton(target.num_steps)) > NODES_OF_SMOOTH:
                yield replace(self, num_nodes=NODES_OF_SMOOTH, cover=COVERS[-1])

    def iterations_begun(self, num_steps: int, iteration: int, max_iterations: int) -> int:
        return iteration

    def expected_iterations(self, stopping: Stopping) -> tuple[int, ...]:
        more = math.log(HALF_A_GREY_LEVEL / stopping.tolerance) / math.log(REDUCED_BY_A_SWEEP)
        most, usual = stopping.max_iterations, EXPECTED_WITH_NOISE if stopping.stochastic else EXPECTED_SWEEPS
        return (max(min(3, most), min(most, usual + math.ceil(more))),)

    def words(self) -> list[str]:
        nodes = [] if self.num_nodes is None else [counted(self.num_nodes, "node")]
        return nodes + ([] if self.cover == 1 else ["no cover" if self.cover is None else f"cover 1 / {self.cover}"])
