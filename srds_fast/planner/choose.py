"""The default plan for a number of steps. No device is asked."""

from __future__ import annotations

from ..solvers.method import Method
from ..solvers.registry import AUTO, unmeasured
from .plan import Plan
from .settings import Settings


def choose(num_steps: int, settings: Settings, stochastic: bool = False) -> Plan:
    """The plan for N steps without knowing costs: what the settings ask for, the rest by the defaults of the method.

    Args:
        num_steps: N.
        settings: what the user asks for.
        stochastic: whether steps add noise.

    Raises:
        InvalidArgument: the settings do not fit the number of steps.
    """
    choice = settings.methods
    options = unmeasured(num_steps, choice) if settings.method == AUTO else choice[0]
    return plan_of(options, num_steps, settings, stochastic)


def plan_of(options: Method, num_steps: int, settings: Settings, stochastic: bool = False) -> Plan:
    """The plan of these options; what they leave open, and all that is no option, is as the settings ask.

    Raises:
        InvalidArgument: they do not fit the number of steps.
    """
    target = settings.target(num_steps, stochastic=stochastic)
    options = options.with_defaults(target)
    iterations = options.most_iterations(target)
    if not settings.exact and settings.max_iterations is not None:
        iterations = min(settings.max_iterations, iterations)
    return Plan(
        options=options,
        num_inference_steps=num_steps,
        max_iterations=max(options.first_iteration, iterations),
        max_rows=settings.max_rows,
        engine=settings.engine,
        tolerance=float(settings.tolerance),
        exact=settings.exact,
    )
