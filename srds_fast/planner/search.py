"""Search for the plan that takes least time on this device: every candidate priced by the measured c(rows)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

from .. import clock
from ..caches import Cache
from ..solvers.method import SAME_LAW
from ..solvers.program import Spent
from ..telemetry.report import Report
from ..words import counted
from .choose import candidates, fixed_at, replicated, until, within_memory
from .context import Context
from .cost_curve import CostCurve
from .experience import Experience, Shares
from .exploration import NEAR, Exploration
from .plan import Candidate, Plan, Prediction
from .settings import Settings

# of the sequential sampler's time: a plan that saves less than this may be no faster, predictions err by as much
WORTH = 0.95
# plans whose time outside the network is measured: those that take least time inside it
CLOSELY = 4
# what that may take, in seconds, or in times that a sequential call spends in the network if that is more: to make a
# program is work of the host, which pays only where the network is what takes time
CLOSELY_SECONDS, CLOSELY_CALLS = 2.0, 3.0
# how many times as much rows beyond the first may cost while another process takes a part of the machine; costs that
# were measured beside one may be as much too high
BUSY = 1.5


@dataclass(frozen=True)
class Known:
    """What was found out of one kind of call, in numbers: it keeps no network and no tensor alive."""

    curve: CostCurve
    # seconds that runs take outside the network, by signature of the plan
    overhead: Cache[float] = field(default_factory=partial(Cache, "seconds outside the network"))
    # by what was asked for
    explorations: Cache[Exploration] = field(
        default_factory=partial(Cache, "explorations", stays=lambda each: each.held)
    )
    experience: Experience = field(default_factory=Experience)

    @property
    def held(self) -> bool:
        """Whether a plan chosen by this must stay."""
        return any(each.held for each in self.explorations.values())


@dataclass(frozen=True)
class Pricing:
    known: Known
    measure_overhead: Callable[[Plan], float]  # seconds that a run takes outside the network; called where it decides
    context: Context
    kind: Hashable = None
    stochastic: bool = False  # whether the steps of the call add noise

    @property
    def most_rows(self) -> int | None:
        """Of the widest wave that may fit into memory; None: no wave was too wide."""
        found = self.known.curve.most_rows, self.known.experience.most_rows
        return min((most for most in found if most is not None), default=None)

    def record(self, plan: Plan, report: Report | None) -> None:
        """Learn from a run of a plan; report: None if the run did not settle."""
        if plan.prediction is None or plan.calibrated or plan.is_sequential:
            return
        settled = plan.options.promise == SAME_LAW or (report is not None and all(report.converged))
        if report is None or (settled and not report.interrupted):
            self.known.experience.record(plan, report, stochastic=self.stochastic)

    def shares(self, plan: Plan) -> Shares:
        return self.known.experience.iterations(plan, stochastic=self.stochastic)

    def expected(self, plan: Plan) -> int:
        """Iterations that half of the runs will stop within."""
        iterations, shares = zip(*self.shares(plan), strict=True)
        reached = zip(iterations, accumulate(shares), strict=True)
        return next((iteration for iteration, share in reached if share >= 0.5), plan.max_iterations)

    def network(self, plan: Plan, iteration: int, dearer: float = 1.0) -> float:
        """Seconds in the network of a run that ends with an iteration, if rows beyond the first cost so much more."""
        curve = plan.costs(self.known.curve)
        one = (1.0 - dearer) * curve(1)
        return sum(one + dearer * curve(rows) for rows in until(plan, iteration).widths(iteration))

    def expected_network(self, plan: Plan, dearer: float = 1.0) -> float:
        """Seconds that runs will spend in the network, the mean over how many iterations they take."""
        return sum(share * self.network(plan, iteration, dearer) for iteration, share in self.shares(plan))

    def work(self, plan: Plan, iteration: int | None = None) -> float:
        """Network time of a run that ends with an iteration, over what is expected; None: the first that is likely."""
        if plan.is_sequential:
            return 1.0
        iteration = self.shares(plan)[0][0] if iteration is None else iteration
        return self.network(plan, iteration) / self.expected_network(plan)

    def overhead(self, plan: Plan, iteration: int) -> float:
        """Seconds outside the network of a run that ends with an iteration."""
        ended, measured = fixed_at(plan, iteration), self.known.overhead
        seconds = measured.get(ended.signature)
        if seconds is None:
            seconds = measured[ended.signature] = self.measure_overhead(ended)
        return seconds

    def of(self, plan: Plan, iteration: int) -> float:
        """Predicted seconds of a run that ends with an iteration."""
        return self.network(plan, iteration) + self.overhead(plan, iteration)


def _priced(plan: Plan, pricing: Pricing) -> Candidate:
    iteration = pricing.expected(plan)
    widths = until(plan, iteration).widths(iteration)
    spent = Spent(len(widths), sum(widths), max(widths))
    seconds = pricing.expected_network(plan) + pricing.overhead(plan, iteration)
    fixed_seconds = pricing.of(fixed_at(plan, iteration), iteration)
    nbytes = plan.costs(pricing.known.curve).memory(spent.peak_rows)
    return Candidate(plan.short(), iteration, *spent, seconds, fixed_seconds, nbytes)


def _priced_in_time(sequential: Plan, others: list[Plan], pricing: Pricing) -> list[tuple[Candidate, Plan]]:
    """The plans with what they are predicted to take, the fastest first.

    To look at a plan closely and to run it, its program must be made. With thousands of steps and a fast network that
    takes longer than several sequential calls. Plans beyond the time for that are left out.
    """
    begun = clock.now()
    reference = _priced(sequential, pricing)
    budget = max(CLOSELY_SECONDS, CLOSELY_CALLS * pricing.expected_network(sequential))
    found = [(reference, sequential)]
    for plan in others:
        expected = plan.options.seconds_of_a_row * plan.rows
        if clock.since(begun, "the time to price plans") + expected < budget:
            found.append((_priced(plan, pricing), plan))
    return sorted(found, key=lambda pair: pair[0].seconds)


def explored(num_steps: int, settings: Settings, stochastic: bool, pricing: Pricing) -> Exploration:
    """The exploration of a kind of call, with predictions that follow from all that was learnt."""
    key, known = (num_steps, settings, stochastic, pricing.context), pricing.known
    version = known.experience.version
    found = known.explorations.setdefault(key, Exploration(settings.explore))
    narrower = (
        found.version is not None
        and pricing.most_rows is not None
        and found.plan.program().peak_rows > pricing.most_rows
    )
    replaced = None
    if narrower and found.settled:  # a wave of the plan did not fit into memory
        replaced, found = found, Exploration(settings.explore)
        known.explorations[key] = found
    if found.version is None or (found.version != version and not found.settled):
        before = None if found.version is None else found.plan
        plan, compared = compare(num_steps, settings, stochastic, pricing, before=before)
        hope = {each.signature: pricing.work(each) for each in compared}
        found.predict(compared, plan, version, hope)
    if replaced is not None:
        found.replace(replaced)
    return found


def compare(
    num_steps: int,
    settings: Settings,
    stochastic: bool,
    pricing: Pricing,
    iterations: Mapping[Hashable, int] | None = None,
    before: Plan | None = None,
) -> tuple[Plan, list[Plan]]:
    """The plan predicted to take least time, and all that were looked at closely, each with its `prediction`.

    iterations: by signature of a plan, those that calibration found to be enough; plans without are left out. before:
    the plan chosen with less known. Graphs of it may exist, so it stays while it is nearly as fast.
    """
    settings = within_memory(settings, pricing.most_rows)
    costs, measured = pricing.known.curve, iterations is not None
    sequential, *others = candidates(num_steps, settings, stochastic, calibrated=measured, ranks=costs.ranks)
    if not measured and costs.replicated is not None:
        others += replicated(num_steps, within_memory(settings, costs.replicated.most_rows), stochastic)
    if iterations is not None:
        enough = ((plan, iterations.get(plan.signature)) for plan in others)
        others = [fixed_at(plan, count) for plan, count in enough if count is not None]
    by_network = {plan: pricing.expected_network(plan) for plan in others}
    limit = NEAR * (pricing.expected_network(sequential) + pricing.overhead(sequential, 1))
    # a plan that is much slower than the sequential sampler in the network alone needs no closer look
    near = (plan for plan in others if pricing.expected_network(plan, 1 / BUSY) < limit)
    seen = sorted(near, key=by_network.__getitem__)
    kept = None if before is None else before.signature
    found = _priced_in_time(sequential, _shortlist(seen, pricing, kept), pricing)
    reference = next(candidate for candidate, plan in found if plan.is_sequential)
    best, winner = found[0]
    if not winner.is_sequential and best.seconds > WORTH * reference.seconds:
        best, winner = reference, sequential
    for candidate, plan in found:
        if plan.signature == kept and WORTH * candidate.seconds <= best.seconds:
            best, winner = candidate, plan
    all_candidates, curve = tuple(candidate for candidate, _ in found), pricing.known.curve

    def predicted(candidate: Candidate, plan: Plan) -> Plan:
        why = _why(plan, candidate, reference, len(found) > 1, len(others) > 0, curve)
        prediction = Prediction(candidate, all_candidates, why, curve, pricing.shares(plan)[0][0])
        return replace(plan, prediction=prediction, context=pricing.context)

    return predicted(best, winner), [predicted(*each) for each in found]


def _shortlist(plans: list[Plan], pricing: Pricing, kept: Hashable) -> list[Plan]:
    """The plans to look at closely, of those that are sorted by their time in the network.

    The costs are those of one moment, and iterations are predicted for each method in its own way. So the best plan of
    each method is among them, shared and replicated, and the best one if rows cost more: what runs take then decides.
    """
    best_of = {(plan.method, plan.replicated): plan for plan in reversed(plans)}
    if_busy = min(plans, key=lambda plan: pricing.expected_network(plan, BUSY), default=None)
    wanted = [*plans[:CLOSELY], *best_of.values(), if_busy]
    return [plan for plan in plans if plan in wanted or plan.signature == kept]


def _why(plan: Plan, best: Candidate, sequential: Candidate, compared: bool, had_choice: bool, whole: CostCurve) -> str:
    curve = plan.costs(whole)
    growth = curve(curve.rows[-1]) / curve(1)
    most = counted(curve.rows[-1], "row")
    how = f"a network call of {most} takes {growth:.1f} times as long as a call of one row ({curve.how})"
    if curve.ranks > 1:
        how += f", both shared by {curve.ranks} ranks"
    if plan.replicated:
        how += ", and each rank evaluates all rows by itself"
    if curve.most_rows is not None:  # the network raised, or there was no memory
        how += f"; calls of more than {counted(curve.most_rows, 'row')} failed"
    if best is not sequential:
        return f"{sequential.seconds / best.seconds:.2f} times faster than sequential: {how}"
    if compared:
        return f"no other plan is predicted to take less than {WORTH:.0%} of its time: {how}"
    if had_choice:
        return f"every other plan would spend over {NEAR} times as long in the network: {how}"
    return f"the settings or the tolerance allow no other plan: {how}"
