"""How many iterations runs will take: what is expected with any network, updated by runs that were observed."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import partial

from ..caches import Cache
from ..solvers.method import Seen, Stopping
from ..telemetry.report import Report
from .plan import Plan

MOST_RUNS = 32

Shares = tuple[tuple[int, float], ...]
"""(iteration that stops a run, share of the runs that it stops), ascending."""


@dataclass
class Experience:
    version: int = 0  # grows when plans are to be compared again
    most_rows: int | None = None  # of the widest wave that may fit into memory; None: none was too wide
    _seen: deque[Seen] = field(default_factory=lambda: deque(maxlen=MOST_RUNS))
    _taken: Cache[Counter[int]] = field(default_factory=partial(Cache, "iterations of runs"))

    def record_oom(self, rows: int) -> None:
        """A wave of so many rows did not fit into memory: later ones have half of them, as each try costs a call."""
        self.most_rows = max(1, min(rows // 2, self.most_rows or rows))
        self.version += 1

    def record(self, plan: Plan, report: Report | None, *, stochastic: bool) -> None:
        """Learn from a run of a plan; report: None if the run did not settle. stochastic: whether steps add noise.

        Plans are compared again if it took iterations that none has taken before, or if twice as many runs were seen.
        """
        if plan.options.scales:
            of_samples = [(math.inf,)] if report is None or not report.change else zip(*report.change, strict=True)
            changes = tuple(tuple(each for each in sample if each is not None) for sample in of_samples)
            self._seen.append(Seen(plan.options, plan.num_inference_steps, stochastic, changes))
        taken = self._taken.setdefault((kind_of_run(plan), stochastic), Counter())
        iterations = plan.max_iterations if report is None else report.iterations
        taken[iterations] += 1
        if taken[iterations] == 1 or taken.total().bit_count() == 1:
            self.version += 1

    def iterations(self, plan: Plan, *, stochastic: bool) -> Shares:
        """What runs of a plan will take: at first as with any network, and more and more as runs were seen to."""
        options, asked = plan.options, (plan.num_inference_steps, plan.max_iterations, plan.tolerance)
        stopping = Stopping.of(options, *asked, stochastic=stochastic)
        expected = () if plan.calibrated or plan.bitwise else options.expected_iterations(stopping)
        if not expected:
            return ((plan.max_iterations, 1.0),)
        if options.scales:
            runs = [run for run in tuple(self._seen) if run.stochastic == stochastic]  # another thread may add to them
            taken = Counter(each for run in runs if (each := options.iterations_from(run, stopping)) is not None)
        else:
            taken = self._taken.get((kind_of_run(plan), stochastic), Counter())
        found = {iteration: float(runs) for iteration, runs in taken.items()}
        for iteration in expected:
            found[iteration] = found.get(iteration, 0.0) + options.weight / len(expected)
        total = sum(found.values())
        return tuple(sorted((iteration, runs / total) for iteration, runs in found.items()))


def kind_of_run(plan: Plan) -> Hashable:
    """What the iterations that a run takes depend on."""
    return replace(plan, options=plan.options.same_iterations(), replicated=False).signature, plan.tolerance
