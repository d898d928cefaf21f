"""Search for the plan that takes least time on this device: every candidate priced by the measured c(rows)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .context import Context
from .cost import CostCurve
from .methods import HALF_A_GREY_LEVEL, Chords, Collocation, FixedPoint, ParaTAA, options_of
from .plan import Candidate, Plan, Prediction, Settings, choose
from .program import FEWEST_NODES
from .report import Report

# of the sequential sampler's time: what promises less is within what predictions err by
WORTH = 0.95
# nodes of collocation, as shares of those that the tolerance asks for; fewer only where they are calibrated, as how
# many sweeps they need differs from network to network
SHARES = (0.5, 0.67, 0.83, 1.0, 1.33)
CORES = (4, 8)
# sweeps after which a tolerance of half a grey level mostly stops a run, and by what factor one more reduces the error:
# on the digits pipeline, 25 to 100 steps, guidance 1 and 5
SWEEPS = 8
REDUCED_BY_A_SWEEP = 3.0
# as many runs as what is expected of any network weighs beside what was seen of this one
RUNS_EXPECTED = 4
# by default plans SRDS mostly stops after one iteration, and the slowest sample of a batch often after two
SRDS_ITERATIONS = 2


@dataclass(frozen=True)
class Known:
    """What was found out of one kind of call, in numbers: no network, no tensor is kept alive by it.

    Attributes:
        curve: c(rows).
        beside: seconds that runs take beside the network, by plan.
        plans: chosen before, by what was asked for.
        taken: by plan, how many runs there were and the iterations that they took together.
    """

    curve: CostCurve
    beside: dict[Hashable, float] = field(default_factory=dict)
    plans: dict[Hashable, Plan] = field(default_factory=dict)
    taken: dict[Hashable, tuple[int, int]] = field(default_factory=dict)

    def saw(self, plan: Plan, report: Report | None) -> None:
        """Learn from a run of a plan; report: None where it did not settle. What changes is weighed anew."""
        if plan.prediction is None or plan.calibrated or plan.method == "sequential":
            return
        if report is not None and (report.interrupted or not all(report.converged)):
            return
        before = self.expected(plan)
        runs, total = self.taken.get(plan.signature, (0, 0))
        # what did not settle has cost the whole sequential run besides
        iterations = 2 * plan.num_inference_steps if report is None else report.iterations
        self.taken[plan.signature] = runs + 1, total + iterations
        if self.expected(plan) != before:
            self.plans.clear()

    def expected(self, plan: Plan) -> int:
        """Iterations that a run will take: what is expected of any network, and more and more what runs have taken."""
        runs, total = self.taken.get(plan.signature, (0, 0))
        mean = (RUNS_EXPECTED * expected_iterations(plan) + total) / (RUNS_EXPECTED + runs)
        return max(1, min(plan.max_iterations, round(mean))) if runs else expected_iterations(plan)


@dataclass(frozen=True)
class Pricing:
    """What a kind of call costs.

    Attributes:
        known: what was found out.
        context: where they were measured.
        kind: of the calls.
        between: seconds that a run of a plan takes beside the network, asked for where it may decide.
    """

    known: Known
    between: Callable[[Plan], float]
    context: Context
    kind: Hashable = None

    @property
    def curve(self) -> CostCurve:
        """c(rows)."""
        return self.known.curve

    def of(self, plan: Plan, iteration: int) -> float:
        """Predicted seconds of a run that ends with an iteration."""
        return self.network(plan, iteration) + self.beside(plan, iteration)

    def network(self, plan: Plan, iteration: int) -> float:
        """Those spent in the network."""
        # a sweep is what it is however many come after it; SRDS works ahead on iterations that it may need
        ended = fixed_at(plan, iteration) if isinstance(plan.options, FixedPoint) else plan
        return self.curve.of(ended.program().widths(iteration))

    def beside(self, plan: Plan, iteration: int) -> float:
        """Those spent beside it."""
        ended = fixed_at(plan, iteration)
        key = ended.signature
        if key not in self.known.beside:
            self.known.beside[key] = self.between(ended)
        return self.known.beside[key]


PlanFor = Callable[[int, bool, Callable[[], Pricing] | None], Plan]
"""(number of steps, whether they add noise, what tells the costs of the call or None) -> the plan of a call."""


def fixed_at(plan: Plan, iteration: int) -> Plan:
    """The plan that runs so many iterations, whatever it finds."""
    if plan.method == "sequential":
        return plan
    return replace(plan, max_iterations=iteration, calibrated=True)


def candidates(num_steps: int, settings: Settings, stochastic: bool, *, calibrated: bool = False) -> Iterator[Plan]:
    """The plans to look at for N steps; sequential is always the first.

    Where steps add noise x0 walks along no smooth curve: fixed-point methods are candidates there only if they are to
    be calibrated.
    """
    yield choose(num_steps, replace(settings, method="sequential", num_blocks=None, max_iterations=None))
    name, _ = options_of(settings.method)
    if name != "auto":
        yield choose(num_steps, settings, stochastic)
        return
    if num_steps < 4:
        return
    of_srds = replace(settings, method="srds")
    usual = choose(num_steps, of_srds, stochastic)
    yield usual
    if settings.num_blocks is None:
        for blocks in {round(usual.num_blocks * factor) for factor in (0.5, 0.7, 1.5)} - {usual.num_blocks}:
            if 2 <= blocks <= num_steps:
                yield choose(num_steps, replace(of_srds, num_blocks=blocks), stochastic)
    asked = (settings.num_blocks, settings.max_iterations) != (None, None)
    specific = asked or settings.coarse_solver != "auto" or not settings.pipelined
    if specific or usual.bits_only or (stochastic and not calibrated):
        return
    usual_nodes = Collocation().with_nodes(settings.tolerance).num_nodes
    assert usual_nodes is not None
    for share in SHARES:
        num_nodes = max(FEWEST_NODES, round(share * usual_nodes))
        if num_nodes < num_steps and (calibrated or share >= 1.0):
            yield choose(num_steps, replace(settings, method=Collocation(num_nodes=num_nodes)))
    yield choose(num_steps, replace(settings, method=ParaTAA()))
    if calibrated:  # they have no tolerance to stop by that could be relied on
        for num_cores in CORES:
            if num_cores <= num_steps:
                yield choose(num_steps, replace(settings, method=Chords(num_cores)), stochastic)


def plans_of(
    prediction: Prediction, num_steps: int, settings: Mapping[str, Any], stochastic: bool
) -> dict[Candidate, Plan]:
    """The plans behind the candidates of a prediction, each for as many iterations as predicted."""
    known: dict[str, Plan] = {}
    for plan in candidates(num_steps, Settings(**settings), stochastic, calibrated=True):
        for each in prediction.candidates:
            if plan.short() == each.name or fixed_at(plan, each.iterations).short() == each.name:
                known[each.name] = fixed_at(plan, each.iterations)
    return {each: known[each.name] for each in prediction.candidates}


def expected_iterations(plan: Plan) -> int:
    """Iterations that a run is expected to take until its tolerance stops it."""
    if plan.calibrated or plan.method in ("sequential", "chords") or plan.bits_only:
        return plan.max_iterations
    if isinstance(plan.options, FixedPoint):
        more = math.log(HALF_A_GREY_LEVEL / plan.tolerance) / math.log(REDUCED_BY_A_SWEEP)
        return max(3, min(plan.max_iterations, SWEEPS + math.ceil(more)))
    return min(plan.max_iterations, SRDS_ITERATIONS)


def priced(plan: Plan, pricing: Pricing, iteration: int | None = None) -> Candidate:
    """A plan with what it is predicted to take."""
    if plan.slides:
        raise ValueError("how many waves a sliding window takes is found on the way")
    iteration = pricing.known.expected(plan) if iteration is None else iteration
    ended = fixed_at(plan, iteration) if isinstance(plan.options, FixedPoint) else plan
    spent = ended.program().spent(iteration)
    return Candidate(
        plan.short(),
        iteration,
        spent.waves,
        spent.rows,
        spent.peak_rows,
        pricing.of(plan, iteration),
        pricing.curve.memory(spent.peak_rows),
    )


def usual(num_steps: int, settings: Settings, stochastic: bool, pricing: Pricing) -> Plan:
    """The fastest plan, chosen once for each number of steps."""
    key = num_steps, settings, stochastic, pricing.context
    plans = pricing.known.plans
    if key not in plans:
        plans[key] = fastest(num_steps, settings, stochastic, pricing)
    return plans[key]


def fastest(
    num_steps: int,
    settings: Settings,
    stochastic: bool,
    pricing: Pricing,
    iterations: Mapping[Hashable, int] | None = None,
) -> Plan:
    """The plan predicted to take least time.

    Args:
        num_steps: N.
        settings: what the user asks for.
        stochastic: whether steps add noise.
        pricing: measured costs.
        iterations: by signature of a plan, those that calibration found to be enough; plans without are left out.

    Returns:
        the plan, its `prediction` filled.
    """
    settings = within_memory(settings, pricing.curve)
    plans = list(candidates(num_steps, settings, stochastic, calibrated=iterations is not None))
    if iterations is not None:
        enough = {plan.signature: iterations.get(plan.signature) for plan in plans[1:]}
        plans = [
            plans[0],
            *(fixed_at(plan, count) for plan in plans[1:] if (count := enough[plan.signature]) is not None),
        ]
    by_network = {plan: pricing.network(plan, pricing.known.expected(plan)) for plan in plans}
    limit = by_network[plans[0]] + pricing.beside(plans[0], 1)
    # what the network alone makes slower than the sequential sampler needs no closer look
    seen = [plans[0], *sorted((plan for plan in plans[1:] if by_network[plan] < limit), key=by_network.__getitem__)]
    found = [(priced(plan, pricing), plan) for plan in seen]
    found.sort(key=lambda pair: pair[0].seconds)
    sequential = next(candidate for candidate, plan in found if plan.method == "sequential")
    best, winner = found[0]
    if winner.method != "sequential" and best.seconds > WORTH * sequential.seconds:
        best, winner = sequential, plans[0]
    prediction = _prediction(best, sequential, [candidate for candidate, _ in found], len(plans), pricing)
    return replace(winner, prediction=prediction, context=pricing.context)


def within_memory(settings: Settings, curve: CostCurve) -> Settings:
    """The settings, no wave wider than the network was found to take."""
    most = curve.most_rows
    if most is None or (settings.max_rows is not None and settings.max_rows <= most):
        return settings
    return replace(settings, max_rows=most)


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
