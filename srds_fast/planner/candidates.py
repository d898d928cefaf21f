"""The plans that the planner compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from ..solvers.registry import AUTO, BY_NAME, SEQUENTIAL
from .choose import choose, plan_of
from .plan import Candidate, Plan, Prediction
from .settings import Settings

# with fewer steps no method saves waves
FEWEST_STEPS = 4


def fixed_at(plan: Plan, iteration: int) -> Plan:
    """The plan that runs so many iterations, whatever it finds."""
    return plan if plan.is_sequential else replace(plan, max_iterations=iteration, calibrated=True)


def until(plan: Plan, iteration: int) -> Plan:
    """A plan whose waves are the same up to an iteration's sample, and that builds few of those behind it."""
    begun = plan.options.iterations_begun(plan.num_inference_steps, iteration, plan.max_iterations)
    return replace(plan, max_iterations=begun)


def candidates(num_steps: int, settings: Settings, stochastic: bool, *, calibrated: bool = False) -> Iterator[Plan]:
    """The plans to look at for N steps; sequential is always the first.

    Args:
        num_steps: N.
        settings: what the user asks for.
        stochastic: whether steps add noise.
        calibrated: the iterations that each needs are to be measured.
    """
    yield plan_of(BY_NAME[SEQUENTIAL](), num_steps, replace(settings, max_iterations=None))
    if settings.method != AUTO:
        yield choose(num_steps, settings, stochastic)
        return
    if num_steps < FEWEST_STEPS:
        return
    target = settings.target(num_steps, stochastic=stochastic)
    for method in settings.methods:
        for options in method.candidates(target, calibrated=calibrated):
            yield plan_of(options, num_steps, settings, stochastic)


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
