"""How many iterations runs will take: what is expected with any network, updated by runs that were observed."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from ..solvers.method import Seen, Stopping
from ..telemetry.report import Report
from .plan import Plan

MOST_RUNS = 32

Shares = tuple[tuple[int, float], ...]
"""(iteration that stops a run, share of the runs that it stops), ascending."""


@dataclass
class Experience:
    """Runs of one kind of call.

    Attributes:
        version: grows when plans are to be weighed anew.
        most_rows: of the widest wave that may fit into memory, after one did not; None: none was too wide.
    """

    version: int = 0
    most_rows: int | None = None
    _seen: deque[Seen] = field(default_factory=lambda: deque(maxlen=MOST_RUNS))
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
        if plan.options.scales:
            changes: tuple[tuple[float, ...], ...] = ((math.inf,),)
            if report is not None and report.change:
                changes = tuple(
                    tuple(change for change in of_sample if change is not None)
                    for of_sample in zip(*report.change, strict=True)
                )
            self._seen.append(Seen(plan.options, plan.num_inference_steps, changes))
        taken = self._taken.setdefault(_kind(plan), Counter())
        taken[took] += 1
        if taken[took] == 1 or taken.total() & (taken.total() - 1) == 0:
            self.version += 1

    def iterations(self, plan: Plan, *, plain: bool) -> Shares:
        """What runs of a plan will take: what is expected with any network, and more and more what was seen.

        Args:
            plan: the plan.
            plain: of the steps, see `solvers.method.plain_steps`.
        """
        options, contraction = plan.options, plan.options.contraction(plain=plain)
        stopping = Stopping(plan.num_inference_steps, plan.max_iterations, plan.tolerance, contraction)
        expected = () if plan.calibrated or plan.bitwise else options.expected_iterations(stopping)
        if not expected:
            return ((plan.max_iterations, 1.0),)
        seen: Counter[int] = Counter()
        if options.scales:
            for run in tuple(self._seen):  # another thread may add to it
                if (iterations := options.iterations_from(run, stopping)) is not None:
                    seen[iterations] += 1
        else:
            seen.update(self._taken.get(_kind(plan), {}))
        found = {iteration: float(runs) for iteration, runs in seen.items()}
        for iteration in expected:
            found[iteration] = found.get(iteration, 0.0) + options.weight / len(expected)
        total = sum(found.values())
        return tuple(sorted((iteration, runs / total) for iteration, runs in found.items()))


def _kind(plan: Plan) -> Hashable:
    """What the iterations that a run takes depend on."""
    return replace(plan, options=plan.options.same_iterations()).signature, plan.tolerance
