"""Search for the plan that takes least time on this device: every candidate priced by the measured c(rows)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace

from ..telemetry.report import Report
from .candidates import candidates, fixed_at, until, within_memory
from .context import Context
from .cost_curve import CostCurve
from .experience import Experience, Shares
from .plan import Candidate, Plan, Prediction
from .settings import Settings

# of the sequential sampler's time: what promises less is within what predictions err by
WORTH = 0.95
# plans whose time beside the network is measured: those that take least in it
CLOSELY = 8


@dataclass(frozen=True)
class Known:
    """What was found out of one kind of call, in numbers: no network, no tensor is kept alive by it.

    Attributes:
        curve: c(rows).
        beside: seconds that runs take beside the network, by plan.
        plans: chosen before, by what was asked for, and the version of the experience that they follow from.
        experience: of runs.
    """

    curve: CostCurve
    beside: dict[Hashable, float] = field(default_factory=dict)
    plans: dict[Hashable, tuple[int, Plan]] = field(default_factory=dict)
    experience: Experience = field(default_factory=Experience)

    def settle(self) -> None:
        """The plans stand, whatever was learnt since they were weighed."""
        for key, (_, plan) in tuple(self.plans.items()):
            self.plans[key] = self.experience.version, plan


@dataclass(frozen=True)
class Pricing:
    """What a kind of call costs.

    Attributes:
        known: what was found out.
        context: where they were measured.
        kind: of the calls.
        plain: whether steps neither add noise, clip, nor look back, see `solvers.method.plain_steps`.
        between: seconds that a run of a plan takes beside the network, asked for where it may decide.
    """

    known: Known
    between: Callable[[Plan], float]
    context: Context
    kind: Hashable = None
    plain: bool = True

    @property
    def curve(self) -> CostCurve:
        """c(rows)."""
        return self.known.curve

    def saw(self, plan: Plan, report: Report | None) -> None:
        """Learn from a run of a plan; report: None where it did not settle."""
        if plan.prediction is None or plan.calibrated or plan.is_sequential:
            return
        if report is not None and (report.interrupted or not all(report.converged)):
            return
        self.known.experience.saw(plan, report)

    @property
    def most_rows(self) -> int | None:
        """Of the widest wave that may fit into memory; None: none was found that does not."""
        found = [most for most in (self.curve.most_rows, self.known.experience.most_rows) if most is not None]
        return min(found, default=None)

    def shares(self, plan: Plan) -> Shares:
        """What runs of a plan will take."""
        return self.known.experience.iterations(plan, plain=self.plain)

    def expected(self, plan: Plan) -> int:
        """Iterations that half of the runs will stop within."""
        reached = 0.0
        for iteration, share in self.shares(plan):
            reached += share
            if reached >= 0.5:
                return iteration
        return plan.max_iterations

    def expected_network(self, plan: Plan) -> float:
        """Seconds that runs will spend in the network, on average over how many iterations they take."""
        return sum(share * self.network(plan, iteration) for iteration, share in self.shares(plan))

    def of(self, plan: Plan, iteration: int) -> float:
        """Predicted seconds of a run that ends with an iteration."""
        return self.network(plan, iteration) + self.beside(plan, iteration)

    def network(self, plan: Plan, iteration: int) -> float:
        """Those spent in the network."""
        return self.curve.of(until(plan, iteration).program().widths(iteration))

    def beside(self, plan: Plan, iteration: int) -> float:
        """Those spent beside it."""
        ended = fixed_at(plan, iteration)
        key = ended.signature
        if key not in self.known.beside:
            self.known.beside[key] = self.between(ended)
        return self.known.beside[key]


def priced(plan: Plan, pricing: Pricing) -> Candidate:
    """A plan with what it is predicted to take."""
    if plan.slides:
        raise ValueError("how many waves a sliding window takes is found on the way")
    iteration = pricing.expected(plan)
    spent = until(plan, iteration).program().spent(iteration)
    return Candidate(
        plan.short(),
        iteration,
        spent.waves,
        spent.rows,
        spent.peak_rows,
        pricing.expected_network(plan) + pricing.beside(plan, iteration),
        pricing.of(fixed_at(plan, iteration), iteration),
        pricing.curve.memory(spent.peak_rows),
    )


def usual(num_steps: int, settings: Settings, stochastic: bool, pricing: Pricing) -> Plan:
    """The fastest plan, kept until more is known, and then left only for one that is clearly faster."""
    key = num_steps, settings, stochastic, pricing.context
    version = pricing.known.experience.version
    weighed, before = pricing.known.plans.get(key, (None, None))
    if before is not None and weighed == version:
        return before
    found = fastest(num_steps, settings, stochastic, pricing, before=before)
    pricing.known.plans[key] = version, found
    return found


def fastest(
    num_steps: int,
    settings: Settings,
    stochastic: bool,
    pricing: Pricing,
    iterations: Mapping[Hashable, int] | None = None,
    before: Plan | None = None,
) -> Plan:
    """The plan predicted to take least time.

    Args:
        num_steps: N.
        settings: what the user asks for.
        stochastic: whether steps add noise.
        pricing: measured costs.
        iterations: by signature of a plan, those that calibration found to be enough; plans without are left out.
        before: the plan that was chosen with less known. What it needs has been recorded: it stays while it is nearly
            as fast.

    Returns:
        the plan, its `prediction` filled.
    """
    settings = within_memory(settings, pricing.most_rows)
    plans = list(candidates(num_steps, settings, stochastic, calibrated=iterations is not None))
    if iterations is not None:
        enough = {plan.signature: iterations.get(plan.signature) for plan in plans[1:]}
        plans = [
            plans[0],
            *(fixed_at(plan, count) for plan in plans[1:] if (count := enough[plan.signature]) is not None),
        ]
    by_network = {plan: pricing.expected_network(plan) for plan in plans}
    limit = by_network[plans[0]] + pricing.beside(plans[0], 1)
    # what the network alone makes slower than the sequential sampler needs no closer look
    seen = sorted((plan for plan in plans[1:] if by_network[plan] < limit), key=by_network.__getitem__)
    kept = [plan for plan in seen[CLOSELY:] if before is not None and plan.signature == before.signature]
    found = [(priced(plan, pricing), plan) for plan in [plans[0], *seen[:CLOSELY], *kept]]
    found.sort(key=lambda pair: pair[0].seconds)
    sequential = next(candidate for candidate, plan in found if plan.is_sequential)
    best, winner = found[0]
    if not winner.is_sequential and best.seconds > WORTH * sequential.seconds:
        best, winner = sequential, plans[0]
    for candidate, plan in found:
        if before is not None and plan.signature == before.signature and WORTH * candidate.seconds <= best.seconds:
            best, winner = candidate, plan
    prediction = _prediction(best, sequential, [candidate for candidate, _ in found], len(plans), pricing)
    earliest, _ = pricing.shares(winner)[0]
    return replace(winner, prediction=replace(prediction, earliest=earliest), context=pricing.context)


def _prediction(
    best: Candidate, sequential: Candidate, found: list[Candidate], num_plans: int, pricing: Pricing
) -> Prediction:
    curve = pricing.curve
    growth = curve(curve.rows[-1]) / curve(1)
    how = f"a call of {curve.rows[-1]} rows takes {growth:.1f} times as long as one of one row ({curve.how})"
    if curve.most_rows is not None:  # the network raised, or there was no memory
        how += f"; calls of more than {curve.most_rows} rows failed"
    if best is not sequential:
        why = f"{sequential.seconds / best.seconds:.2f} times faster than sequential: {how}"
    elif len(found) > 1:
        why = f"no other plan is predicted to take less than {WORTH:.0%} of its time: {how}"
    elif num_plans == 1:
        why = f"no other plan comes within the tolerance, or none is asked for: {how}"
    else:
        why = f"in the network alone every other plan would take longer: {how}"
    return Prediction(best, tuple(found), why, curve)
