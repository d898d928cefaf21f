"""How far a method is from the sequential sample, after how many waves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from bench.workloads.problems import Problem, difference
from srds_fast.planner.plan import Plan
from srds_fast.solvers.contract import Checkpoint

from .contestants import Contestant

# a run is ended when it has been within the tightest bound for so many iterations
ENOUGH = 3


@dataclass(frozen=True)
class Point:
    """A sample that a method can end with.

    Attributes:
        setting: what it took: the iteration, or the method's own tolerance.
        difference: to the sequential sample, in grey levels: of each sample the mean, of these the 95th percentile.
        waves, rows: network calls one after another, and evaluations: means over the samples.
        peak_rows: of the widest wave of all.
        iteration, tolerance: the setting as a number; None: it was the other one.
    """

    setting: str
    difference: float
    waves: float
    rows: float
    peak_rows: int
    iteration: int | None = None
    tolerance: float | None = None

    @classmethod
    def of(cls, setting: str, difference: float, spent: Sequence[Any], **number: Any) -> Point:
        """The point of runs that spent this: waves, rows, peak_rows of each."""
        waves, rows = mean(each.waves for each in spent), mean(each.rows for each in spent)
        return cls(setting, difference, waves, rows, max(each.peak_rows for each in spent), **number)


class _Enough(Exception):
    """This run need not go on."""


def line(
    contestant: Contestant, problem: Problem, steps: int, reference: Tensor, bounds: Sequence[float]
) -> list[Point]:
    """The points of a method, cheapest first, until it is within the tightest bound or has run N waves.

    Args:
        reference: the sequential samples.
        bounds: in grey levels. A method that stops by itself gets one more run between the tolerances on either side
            of each.
    """
    if not contestant.tolerances:
        return list(_checkpoints(contestant.plan(steps), problem, reference, min(bounds)))
    points: dict[float, Point] = {}
    for tolerance in contestant.tolerances:
        points[tolerance] = point = _stopped(contestant, steps, tolerance, problem, reference)
        if point.difference <= min(bounds) or point.waves >= steps:
            break
    for bound in bounds:
        within = [each for each in points if points[each].difference <= bound]
        outside = [each for each in points if points[each].difference > bound]
        if within and outside:
            tolerance = math.sqrt(max(within) * min(outside))
            points[tolerance] = _stopped(contestant, steps, tolerance, problem, reference)
    return [points[each] for each in sorted(points, reverse=True)]


def cheapest(points: list[Point], bound: float) -> Point | None:
    """The point of fewest waves that is within the bound, as are all after it; None where there is none."""
    within = takewhile(lambda point: point.difference <= bound, reversed(points))
    return min(within, key=lambda point: (point.waves, point.rows), default=None)


def _checkpoints(plan: Plan, problem: Problem, reference: Tensor, tightest: float) -> Iterator[Point]:
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
        yield Point.of(f"iteration {iteration}", reached, [ended.spent(iteration)], iteration=iteration)


def _stopped(contestant: Contestant, steps: int, tolerance: float, problem: Problem, reference: Tensor) -> Point:
    plan = contestant.plan(steps, tolerance)
    spent: list[Any]
    if plan.slides:
        # sample by sample: the window of a batch would slide as its slowest sample does
        runs = [problem.one(sample).sampled(steps, plan=plan) for sample in range(len(problem.x))]
        spent = [run.report for run in runs]
    else:
        runs, program = [problem.sampled(steps, plan=plan)], plan.program()
        spent = [program.spent(iteration) for iteration in runs[0].report.iterations_per_sample]
    off = float(difference(torch.cat([run.sample for run in runs]), reference).quantile(0.95))
    return Point.of(f"tolerance {tolerance:.2g}", off, spent, tolerance=tolerance)
