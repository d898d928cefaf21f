"""How far a method is from the sequential sample, after how many waves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import torch
from torch import Tensor

from bench.workloads.problems import Problem, difference
from srds_fast.planner.choose import fixed_at
from srds_fast.planner.plan import Plan
from srds_fast.solvers.contract import Checkpoint
from srds_fast.solvers.program import Program

from .contestants import Contestant

# a run is ended when it has been within the tightest bound for so many iterations
ENOUGH = 3


@dataclass(frozen=True)
class Point:
    """A sample that a method can end with.

    Attributes:
        setting: what it took: the iteration, or the method's own tolerance.
        difference: to the sequential sample, in grey levels: of each sample the mean, of these the 95th percentile.
        widths: rows of every wave, of one run, or of one run for each sample where samples end on their own.
        iteration, tolerance: the setting as a number; None: it was the other one.
    """

    setting: str
    difference: float
    widths: tuple[tuple[int, ...], ...]
    iteration: int | None = None
    tolerance: float | None = None

    @property
    def waves(self) -> float:
        """Network calls one after another; the mean over runs."""
        return mean(map(len, self.widths))

    @property
    def rows(self) -> float:
        """Network evaluations; the mean over runs."""
        return mean(map(sum, self.widths))

    @property
    def peak_rows(self) -> int:
        """Of the widest wave of all."""
        return max(map(max, self.widths))


Line = list[Point]


class _Enough(Exception):
    """This run need not go on."""


def line(contestant: Contestant, problem: Problem, steps: int, reference: Tensor, bounds: Sequence[float]) -> Line:
    """The points of a method, cheapest first, until it is within the tightest bound or has run N waves.

    Args:
        reference: the sequential samples.
        bounds: in grey levels. A method that stops by itself gets one more run between the tolerances on either side
            of each.
    """
    if not contestant.tolerances:
        return list(_checkpoints(contestant.plan(steps), problem, reference, min(bounds)))
    points: dict[float, Point] = {}

    def run(tolerance: float) -> Point:
        plan = contestant.plan(steps, tolerance)
        points[tolerance] = _stopped(plan, tolerance, problem, reference)
        return points[tolerance]

    for tolerance in contestant.tolerances:
        point = run(tolerance)
        if point.difference <= min(bounds) or point.waves >= steps:
            break
    for bound in bounds:
        within = [each for each in points if points[each].difference <= bound]
        outside = [each for each in points if points[each].difference > bound]
        if within and outside:
            run(math.sqrt(max(within) * min(outside)))
    return [points[each] for each in sorted(points, reverse=True)]


def cheapest(points: Line, bound: float) -> Point | None:
    """The point of fewest waves that is within the bound, as are all after it; None where there is none."""
    within: list[Point] = []
    for point in reversed(points):
        if point.difference > bound:
            break
        within.append(point)
    return min(within, key=lambda point: (point.waves, point.rows), default=None)


def plan_of(contestant: Contestant, steps: int, point: Point) -> Plan:
    """A plan that ends with this point."""
    if point.iteration is None:
        return contestant.plan(steps, point.tolerance)
    return fixed_at(contestant.plan(steps), point.iteration)


def _checkpoints(plan: Plan, problem: Problem, reference: Tensor, tightest: float) -> Iterator[Point]:
    """One run of all samples together, a point at every checkpoint."""
    p95: dict[int, float] = {}
    errors = torch.full((len(reference),), torch.inf, dtype=torch.float64)
    program = plan.program()

    def look(checkpoint: Checkpoint) -> None:
        samples = list(checkpoint.samples)
        errors[samples] = difference(checkpoint.sample, reference[samples])
        p95[checkpoint.iteration] = float(errors.quantile(0.95))
        latest = list(p95.values())[-ENOUGH:]
        there = len(latest) == ENOUGH and max(latest) <= tightest
        if there or program.spent(checkpoint.iteration).waves >= plan.num_inference_steps:
            raise _Enough

    with contextlib.suppress(_Enough):
        problem.sampled(plan.num_inference_steps, plan=plan, observer=look)
    for iteration, reached in p95.items():
        # SRDS begins rows for later iterations, but not if it is told before to end with this one
        ended = replace(plan, max_iterations=iteration).program() if plan.method == "srds" else program
        yield Point(f"iteration {iteration}", reached, (_widths(ended, iteration),), iteration=iteration)


def _widths(program: Program, iteration: int) -> tuple[int, ...]:
    spent = program.spent(iteration)
    return tuple(len(wave.rows) for wave in program.waves[: spent.waves])


def _stopped(plan: Plan, tolerance: float, problem: Problem, reference: Tensor) -> Point:
    """A run that stops each sample by itself."""
    if plan.slides:
        widths, samples = _one_by_one(plan, problem)
    else:
        found = problem.sampled(plan.num_inference_steps, plan=plan)
        program = plan.program()
        widths = [_widths(program, iteration) for iteration in found.report.iterations_per_sample]
        samples = found.sample
    off = float(difference(samples, reference).quantile(0.95))
    return Point(f"tolerance {tolerance:.2g}", off, tuple(widths), tolerance=tolerance)


def _one_by_one(plan: Plan, problem: Problem) -> tuple[list[tuple[int, ...]], Tensor]:
    """Sample by sample: the window of a batch would slide as its slowest sample does."""
    widths, samples = [], []
    for sample in range(len(problem.x)):
        seen: list[int] = []
        alone = problem.one(sample)
        alone = alone._replace(denoiser=_counted(alone.denoiser, seen))
        samples.append(alone.sampled(plan.num_inference_steps, plan=plan).sample)
        widths.append(tuple(seen))
    return widths, torch.cat(samples)


def _counted(denoiser: Callable[..., Tensor], seen: list[int]) -> Callable[..., Tensor]:
    def counting(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        seen.append(len(x))
        return denoiser(x, t, **cond)

    return counting
