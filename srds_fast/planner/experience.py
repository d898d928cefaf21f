"""How many iterations runs will take: what is expected of any network, and what was seen of this one.

Of SRDS it is the first change that says it: it falls with the square of the number of blocks (2M jumps; with the number
itself where jumps are of first order), so that a run with some blocks tells of runs with others. Digits, guidance 5,
times B^2: 1.9 to 2.1 for 6 to 12 blocks of 25 steps, 3.4 to 4.2 for 8 to 17 blocks of 50.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..solvers.convergence import Contraction, estimated_error
from ..solvers.fixed_point.options import HALF_A_GREY_LEVEL, FixedPoint
from ..telemetry.report import Report
from .plan import Plan

# sweeps after which a tolerance of half a grey level mostly stops a run, and by what factor one more reduces the error:
# on the digits pipeline, 25 to 100 steps, guidance 1 and 5
SWEEPS = 8
REDUCED_BY_A_SWEEP = 3.0
# as many runs as what is expected of any network weighs beside what was seen of this one: less for SRDS, where a run
# tells by how far it stopped in time
RUNS_EXPECTED = 4
RUNS_EXPECTED_OF_SRDS = 2
# the first change of N steps in B blocks is about this times N / B^2 (fewer than N / 2 blocks: digits 0.06 to 0.08, a
# mixture of Gaussians 0.09 to 0.2), and of B blocks with first-order jumps about this times 1 / B
FIRST_CHANGE = {"2m": 0.1, "ddim": 0.65}
ORDER = {"2m": 2, "ddim": 1}
# about how far samples lie apart in it
SPREAD = (0.6, 1.0, 1.7)
MOST_RUNS = 32

Changes = tuple[float, ...]
Shares = tuple[tuple[int, float], ...]
"""(iteration that stops a run, share of the runs that it stops), ascending."""


class Refined(NamedTuple):
    """A run of SRDS.

    Attributes:
        num_steps, num_blocks, coarse_solver: of its plan.
        changes: of each sample, iteration by iteration; one that is infinite, where the run did not settle.
    """

    num_steps: int
    num_blocks: int
    coarse_solver: str
    changes: tuple[Changes, ...]

    def taken(self, plan: Plan, contraction: Contraction) -> int:
        """Iterations that such a run would take with the blocks and the tolerance of a plan."""
        ratio = self.num_blocks / plan.num_blocks
        scale = ratio ** ORDER[self.coarse_solver]
        # first-order jumps correct each other by as much less as there are fewer of them
        further = ratio if self.coarse_solver == "ddim" else 1.0

        def scaled(changes: Changes) -> Changes:
            return tuple(scale * further**number * change for number, change in enumerate(changes))

        return max(_stops(scaled(each), plan.tolerance, contraction, plan.max_iterations) for each in self.changes)


@dataclass
class Experience:
    """Runs of one kind of call.

    Attributes:
        version: grows when plans are to be weighed anew.
        most_rows: of the widest wave that may fit into memory, after one did not; None: none was too wide.
    """

    version: int = 0
    most_rows: int | None = None
    _refined: deque[Refined] = field(default_factory=lambda: deque(maxlen=MOST_RUNS))
    _taken: dict[Hashable, Counter[int]] = field(default_factory=dict)

    def had_no_room(self, rows: int) -> None:
        """A wave of so many rows did not fit into memory."""
        self.most_rows = max(1, min(rows - 1, self.most_rows or rows))
        self.version += 1

    def saw(self, plan: Plan, report: Report | None) -> None:
        """Learn from a run of a plan; report: None where it did not settle.

        Plans are weighed anew where it took what none has taken before, or twice as many were seen.
        """
        took = plan.max_iterations if report is None else report.iterations
        if plan.method == "srds":
            changes: tuple[Changes, ...] = ((math.inf,),)
            if report is not None and report.change:
                changes = tuple(
                    tuple(change for change in of_sample if change is not None)
                    for of_sample in zip(*report.change, strict=True)
                )
            self._refined.append(Refined(plan.num_inference_steps, plan.num_blocks, plan.coarse_solver, changes))
        taken = self._taken.setdefault(_kind(plan), Counter())
        taken[took] += 1
        if taken[took] == 1 or taken.total() & (taken.total() - 1) == 0:
            self.version += 1

    def iterations(self, plan: Plan, contraction: Contraction) -> Shares:
        """What runs of a plan will take: what is expected of any network, and more and more what was seen."""
        if plan.calibrated or plan.bits_only or not (plan.method == "srds" or isinstance(plan.options, FixedPoint)):
            return ((plan.max_iterations, 1.0),)
        seen: Counter[int] = Counter()
        if plan.method == "srds":
            for each in tuple(self._refined):  # another thread may add to it
                if (each.num_steps, each.coarse_solver) == (plan.num_inference_steps, plan.coarse_solver):
                    seen[each.taken(plan, contraction)] += 1
        else:
            seen.update(self._taken.get(_kind(plan), {}))
        found: dict[int, float] = {iteration: float(runs) for iteration, runs in seen.items()}
        weight = RUNS_EXPECTED_OF_SRDS if plan.method == "srds" else RUNS_EXPECTED
        expected = list(_expected(plan, contraction))
        for iteration in expected:
            found[iteration] = found.get(iteration, 0.0) + weight / len(expected)
        total = sum(found.values())
        return tuple(sorted((iteration, runs / total) for iteration, runs in found.items()))


def _expected(plan: Plan, contraction: Contraction) -> Iterator[int]:
    """Iterations that runs with any network take, each as likely as the others."""
    if isinstance(plan.options, FixedPoint):
        more = math.log(HALF_A_GREY_LEVEL / plan.tolerance) / math.log(REDUCED_BY_A_SWEEP)
        yield max(min(3, plan.max_iterations), min(plan.max_iterations, SWEEPS + math.ceil(more)))
        return
    first = FIRST_CHANGE[plan.coarse_solver] / plan.num_blocks ** ORDER[plan.coarse_solver]
    if plan.coarse_solver == "2m":
        first *= plan.num_inference_steps
    for scale in SPREAD:
        yield _stops((scale * first,), plan.tolerance, contraction, plan.max_iterations)


def _stops(changes: Changes, tolerance: float, contraction: Contraction, most: int) -> int:
    """The iteration after which a sample stops; changes that were not seen shrink as the last ones did."""
    seen = list(changes)
    shrinks = changes[-1] / changes[-2] if len(changes) > 1 and changes[-2] else contraction.first / contraction.caution
    for iteration in range(1, most):
        if len(seen) < iteration:
            seen.append(seen[-1] * shrinks)
        if estimated_error(seen[:iteration], contraction) <= tolerance:
            return iteration
    return most


def _kind(plan: Plan) -> Hashable:
    """What the iterations that a run takes depend on: not on how many are in flight."""
    return replace(plan, in_flight=None).signature, plan.tolerance
