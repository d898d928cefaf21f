"""The plans that the planner compares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from ..solvers.chords.options import Chords
from ..solvers.fixed_point.options import Collocation, FixedPoint, ParaTAA
from ..solvers.fixed_point.program import FEWEST_NODES
from ..solvers.method import options_of
from .choose import choose
from .plan import Candidate, Plan, Prediction
from .settings import Settings

# nodes of collocation, as shares of those that the tolerance asks for; fewer only where they are calibrated, as how
# many sweeps they need differs from network to network
SHARES = (0.5, 0.67, 0.83, 1.0, 1.33)
CORES = (4, 8)
# blocks of SRDS, as shares of the usual number
BLOCKS = (0.5, 0.7, 1.4, 2.0)
# iterations of SRDS in flight, where rows cost something; None: as many as there are
IN_FLIGHT = (1, 2, None)


def fixed_at(plan: Plan, iteration: int) -> Plan:
    """The plan that runs so many iterations, whatever it finds."""
    if plan.method == "sequential":
        return plan
    return replace(plan, max_iterations=iteration, calibrated=True)


def until(plan: Plan, iteration: int) -> Plan:
    """A plan whose waves are the same up to an iteration's sample, and that builds few of those behind it."""
    if isinstance(plan.options, FixedPoint):
        return fixed_at(plan, iteration)
    if plan.method != "srds":
        return plan
    begun = iteration
    if plan.in_flight is not None:
        begun += plan.in_flight - 1
    elif plan.pipelined:  # in the waves until then, and none before the steps that lead to its first block
        steps, blocks = plan.num_inference_steps, plan.num_blocks
        begun = (iteration * math.ceil(steps / blocks) + blocks - iteration) // (steps // blocks) + 1
    return replace(plan, max_iterations=min(plan.max_iterations, begun))


def candidates(num_steps: int, settings: Settings, stochastic: bool, *, calibrated: bool = False) -> Iterator[Plan]:
    """The plans to look at for N steps; sequential is always the first.

    Where steps add noise x0 walks along no smooth curve: fixed-point methods are candidates there only if they are to
    be calibrated.
    """
    yield choose(
        num_steps, replace(settings, method="sequential", num_blocks=None, max_iterations=None, in_flight=None)
    )
    name, _ = options_of(settings.method)
    if name != "auto":
        yield choose(num_steps, settings, stochastic)
        return
    if num_steps < 4:
        return
    of_srds = replace(settings, method="srds")
    usual = choose(num_steps, of_srds, stochastic)
    blocks = {usual.num_blocks}
    if settings.num_blocks is None:
        blocks |= {round(usual.num_blocks * share) for share in BLOCKS}
    # what is known to be needed is begun as soon as it can be
    holds_back = usual.pipelined and usual.max_iterations > 1 and not (usual.bits_only or calibrated)
    for num_blocks in sorted(blocks & set(range(2, num_steps + 1)) | {usual.num_blocks}):
        for in_flight in IN_FLIGHT if holds_back and settings.in_flight is None else (settings.in_flight,):
            yield choose(num_steps, replace(of_srds, num_blocks=num_blocks, in_flight=in_flight), stochastic)
    asked = (settings.num_blocks, settings.max_iterations, settings.in_flight) != (None, None, None)
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
    asked = Settings(**settings)
    all_plans = (candidates(num_steps, asked, stochastic, calibrated=each) for each in (False, True))
    for plan in chain.from_iterable(all_plans):
        for each in prediction.candidates:
            if plan.short() == each.name or fixed_at(plan, each.iterations).short() == each.name:
                known[each.name] = fixed_at(plan, each.iterations)
    return {each: known[each.name] for each in prediction.candidates}


def within_memory(settings: Settings, most: int | None) -> Settings:
    """The settings, no wave wider than so many rows."""
    if most is None or (settings.max_rows is not None and settings.max_rows <= most):
        return settings
    return replace(settings, max_rows=most)
