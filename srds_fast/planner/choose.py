"""The plans for a number of steps: the default one, made without measuring, and those that the planner compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..solvers.method import Method, Stopping
from ..solvers.registry import AUTO, BY_NAME, SEQUENTIAL, unmeasured
from .plan import MOST_ROWS, Candidate, Plan, Prediction
from .settings import Settings

# with fewer steps no method saves waves
FEWEST_STEPS = 4


def choose(num_steps: int, settings: Settings, stochastic: bool = False) -> Plan:
    """The plan for N steps without knowing costs: what the settings ask for, the rest by the defaults of the method.

    stochastic: whether steps add noise. Raises InvalidArgument if the settings do not fit the number of steps.
    """
    choice = settings.methods
    options = unmeasured(num_steps, choice) if settings.method == AUTO else choice[0]
    return plan_of(options, num_steps, settings, stochastic)


def plan_of(options: Method, num_steps: int, settings: Settings, stochastic: bool) -> Plan:
    """The plan of these options; the settings decide everything else. Raises as `choose` does."""
    target = settings.target(num_steps, stochastic=stochastic)
    options = options.with_defaults(target)
    iterations = options.most_iterations(target)
    if settings.max_iterations is not None:  # an exact run has none
        iterations = min(settings.max_iterations, iterations)
    iterations = max(options.first_iteration, iterations)
    asked = settings.max_rows, settings.engine, float(settings.tolerance), settings.exact
    plan = Plan(options, num_steps, iterations, *asked)
    if settings.latency == "adaptive" or plan.slides:
        return plan
    stopping = Stopping.of(options, num_steps, iterations, plan.tolerance, stochastic=stochastic)
    expected = options.expected_iterations(stopping)
    return fixed_at(plan, iterations if settings.max_iterations is not None or not expected else max(expected))


def candidates(
    num_steps: int, settings: Settings, stochastic: bool, *, calibrated: bool = False, ranks: int = 1
) -> Iterator[Plan]:
    """The plans to compare for N steps, sequential first.

    calibrated: the iterations of each are to be measured. ranks: that share the rows of a wave.
    """
    yield plan_of(BY_NAME[SEQUENTIAL](), num_steps, replace(settings, max_iterations=None), stochastic)
    if settings.method != AUTO:
        yield choose(num_steps, settings, stochastic)
    elif num_steps >= FEWEST_STEPS:
        target = settings.target(num_steps, stochastic=stochastic, ranks=ranks)
        for method in settings.methods:
            for options in method.candidates(target, calibrated=calibrated):
                plan = plan_of(options, num_steps, settings, stochastic)
                if plan.rows <= MOST_ROWS:
                    yield plan


def replicated(num_steps: int, settings: Settings, stochastic: bool) -> Iterator[Plan]:
    """The plans to compare where each of several ranks evaluates all rows by itself, sequential first.

    Windows that slide are left out: values decide which rows are next, so ranks that round differently would part.
    """
    of_one = candidates(num_steps, settings, stochastic)
    return (replace(plan, replicated=True) for plan in of_one if not plan.slides)


def fixed_at(plan: Plan, iteration: int) -> Plan:
    """The plan that always runs so many iterations."""
    return plan if plan.is_sequential else replace(plan, max_iterations=iteration, calibrated=True)


def until(plan: Plan, iteration: int) -> Plan:
    """A plan with the same waves up to an iteration's sample, and few after it."""
    begun = plan.options.iterations_begun(plan.num_inference_steps, iteration, plan.max_iterations)
    return replace(plan, max_iterations=begun)


def within_memory(settings: Settings, most: int | None) -> Settings:
    """The settings, with no wave wider than so many rows."""
    given = [rows for rows in (settings.max_rows, most) if rows is not None]
    return replace(settings, max_rows=min(given, default=None))


def plans_of(
    prediction: Prediction, num_steps: int, settings: Mapping[str, Any], stochastic: bool
) -> dict[Candidate, Plan]:
    """The plans behind the candidates of a prediction, each for as many iterations as predicted."""
    asked, ranks = Settings(**settings), prediction.curve.ranks
    plans = [
        plan for way in (False, True) for plan in candidates(num_steps, asked, stochastic, calibrated=way, ranks=ranks)
    ]
    if prediction.curve.replicated is not None:
        plans += replicated(num_steps, asked, stochastic)
    found = {}
    for each in prediction.candidates:
        for plan in plans:
            if each.name in (plan.short(), fixed_at(plan, each.iterations).short()):
                found[each] = fixed_at(plan, each.iterations)
    return found
