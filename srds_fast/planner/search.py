"""Search for the plan that takes least time on this device: every candidate priced by the measured c(rows)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

from ..telemetry.report import Report
from .choose import candidates, fixed_at, until, within_memory
from .context import Context
from .cost_curve import CostCurve
from .experience import Experience, Shares
from .plan import Candidate, Plan, Prediction
from .settings import Settings

# of the sequential sampler's time: a plan that saves less than this may be no faster, predictions err by as much
WORTH = 0.95
# plans whose time outside the network is measured: those that take least time inside it
CLOSELY = 8


@dataclass(frozen=True)
class Known:
    """What was found out of one kind of call, in numbers: it keeps no network and no tensor alive."""

    curve: CostCurve
    # seconds that runs take outside the network, by signature of the plan
    overhead: dict[Hashable, float] = field(default_factory=dict)
    # chosen before, by what was asked for, and the version of the experience that they follow from
    plans: dict[Hashable, tuple[int, Plan]] = field(default_factory=dict)
    experience: Experience = field(default_factory=Experience)

    def settle(self) -> None:
        """Keep the plans chosen so far, whatever was learnt since."""
        self.plans.update({key: (self.experience.version, plan) for key, (_, plan) in tuple(self.plans.items())})


@dataclass(frozen=True)
class Pricing:
    known: Known
    measure_overhead: Callable[[Plan], float]  # seconds that a run takes outside the network; called where it decides
    context: Context
    kind: Hashable = None
    plain: bool = True  # see `solvers.method.plain_steps`

    @property
    def most_rows(self) -> int | None:
        """Of the widest wave that may fit into memory; None: no wave was too wide."""
        found = self.known.curve.most_rows, self.known.experience.most_rows
        return min((most for most in found if most is not None), default=None)

    def record(self, plan: Plan, report: Report | None) -> None:
        """Learn from a run of a plan; report: None if the run did not settle."""
        if plan.prediction is None or plan.calibrated or plan.is_sequential:
            return
        if report is None or (all(report.converged) and not report.interrupted):
            self.known.experience.record(plan, report)

    def shares(self, plan: Plan) -> Shares:
        return self.known.experience.iterations(plan, plain=self.plain)

    def expected(self, plan: Plan) -> int:
        """Iterations that half of the runs will stop within."""
        iterations, shares = zip(*self.shares(plan), strict=True)
        reached = zip(iterations, accumulate(shares), strict=True)
        return next((iteration for iteration, share in reached if share >= 0.5), plan.max_iterations)

    def network(self, plan: Plan, iteration: int) -> float:
        """Seconds in the network of a run that ends with an iteration."""
        return sum(map(self.known.curve, until(plan, iteration).program().widths(iteration)))

    def expected_network(self, plan: Plan) -> float:
        """Seconds that runs will spend in the network, the mean over how many iterations they take."""
        return sum(share * self.network(plan, iteration) for iteration, share in self.shares(plan))

    def overhead(self, plan: Plan, iteration: int) -> float:
        """Seconds outside the network of a run that ends with an iteration."""
        ended, measured = fixed_at(plan, iteration), self.known.overhead
        if ended.signature not in measured:
            measured[ended.signature] = self.measure_overhead(ended)
        return measured[ended.signature]

    def of(self, plan: Plan, iteration: int) -> float:
        """Predicted seconds of a run that ends with an iteration."""
        return self.network(plan, iteration) + self.overhead(plan, iteration)


def _priced(plan: Plan, pricing: Pricing) -> Candidate:
    iteration = pricing.expected(plan)
    spent = until(plan, iteration).program().spent(iteration)
    seconds = pricing.expected_network(plan) + pricing.overhead(plan, iteration)
    fixed_seconds = pricing.of(fixed_at(plan, iteration), iteration)
    nbytes = pricing.known.curve.memory(spent.peak_rows)
    return Candidate(plan.short(), iteration, *spent, seconds, fixed_seconds, nbytes)


def default_plan(num_steps: int, settings: Settings, stochastic: bool, pricing: Pricing) -> Plan:
    """The fastest plan. It is kept until more is known, and then left only for one that is clearly faster."""
    key = num_steps, settings, stochastic, pricing.context
    version = pricing.known.experience.version
    known_then, plan = pricing.known.plans.get(key, (None, None))
    if plan is None or known_then != version:
        plan = fastest(num_steps, settings, stochastic, pricing, before=plan)
        pricing.known.plans[key] = version, plan
    return plan


def fastest(
    num_steps: int,
    settings: Settings,
    stochastic: bool,
    pricing: Pricing,
    iterations: Mapping[Hashable, int] | None = None,
    before: Plan | None = None,
) -> Plan:
    """The plan predicted to take least time, its `prediction` filled.

    iterations: by signature of a plan, those that calibration found to be enough; plans without are left out. before:
    the plan chosen with less known. Graphs of it may exist, so it stays while it is nearly as fast.
    """
    settings = within_memory(settings, pricing.most_rows)
    sequential, *others = candidates(num_steps, settings, stochastic, calibrated=iterations is not None)
    if iterations is not None:
        enough = ((plan, iterations.get(plan.signature)) for plan in others)
        others = [fixed_at(plan, count) for plan, count in enough if count is not None]
    by_network = {plan: pricing.expected_network(plan) for plan in others}
    limit = pricing.expected_network(sequential) + pricing.overhead(sequential, 1)
    # a plan that is slower than the sequential sampler in the network alone needs no closer look
    seen = sorted((plan for plan in others if by_network[plan] < limit), key=by_network.__getitem__)
    kept = None if before is None else before.signature
    closely = [sequential, *seen[:CLOSELY], *(plan for plan in seen[CLOSELY:] if plan.signature == kept)]
    found = sorted(((_priced(plan, pricing), plan) for plan in closely), key=lambda pair: pair[0].seconds)
    reference = next(candidate for candidate, plan in found if plan.is_sequential)
    best, winner = found[0]
    if not winner.is_sequential and best.seconds > WORTH * reference.seconds:
        best, winner = reference, sequential
    for candidate, plan in found:
        if plan.signature == kept and WORTH * candidate.seconds <= best.seconds:
            best, winner = candidate, plan
    why = _why(best, reference, len(found) > 1, len(others) > 0, pricing.known.curve)
    earliest, _ = pricing.shares(winner)[0]
    prediction = Prediction(best, tuple(candidate for candidate, _ in found), why, pricing.known.curve, earliest)
    return replace(winner, prediction=prediction, context=pricing.context)


def _why(best: Candidate, sequential: Candidate, compared: bool, had_choice: bool, curve: CostCurve) -> str:
    growth = curve(curve.rows[-1]) / curve(1)
    how = f"a call of {curve.rows[-1]} rows takes {growth:.1f} times as long as one of one row ({curve.how})"
    if curve.most_rows is not None:  # the network raised, or there was no memory
        how += f"; calls of more than {curve.most_rows} rows failed"
    if best is not sequential:
        return f"{sequential.seconds / best.seconds:.2f} times faster than sequential: {how}"
    if compared:
        return f"no other plan is predicted to take less than {WORTH:.0%} of its time: {how}"
    if had_choice:
        return f"in the network alone every other plan would take longer: {how}"
    return f"no other plan comes within the tolerance, or none is asked for: {how}"
