"""Calibration: how many iterations each plan needs on the user's own network, found by running them.

A tolerance stops a run by an estimate of its error. Calibration measures the difference to the sequential samples once,
and fixes the iterations that keep it within the tolerance for nearly all samples: every call of the kind then takes the
same time, and none runs an iteration only to confirm.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ..errors import DivergenceError, InvalidArgument
from ..solvers.checks import check_number, check_positive
from ..words import counted
from .choose import candidates, fixed_at, within_memory
from .plan import Plan
from .search import Pricing, compare
from .settings import Settings

logger = logging.getLogger("srds_fast")

RunAll = Callable[[Plan], Sequence[tuple[int, Tensor]]]
"""plan -> (iteration, samples [num_samples, ...]) after each iteration, of the samples to calibrate with."""


def calibrated(
    num_steps: int,
    settings: Settings,
    stochastic: bool,
    pricing: Pricing,
    run: RunAll,
    quantile: float,
    begins: Callable[[int], object] = lambda plans: None,
) -> Plan:
    """The fastest plan whose samples are within the tolerance of the sequential ones.

    begins: told how many plans are going to be run.
    quantile: share of the samples, 0 to 1, whose mean absolute difference must be within the tolerance. Raises
    InvalidArgument if it or the tolerance is out of range.
    """
    check_positive("quantile", quantile)
    check_number("quantile", quantile, 0, 1, why="It is a share of the samples.")
    if settings.exact or settings.tolerance == 0:
        raise InvalidArgument(
            "exact=True or tolerance=0 was given. Such runs stop when nothing changes any more, so there is nothing "
            "to calibrate. Give a tolerance."
        )
    settings = within_memory(settings, pricing.most_rows)
    ranks = pricing.known.curve.ranks
    sequential, *others = candidates(num_steps, settings, stochastic, calibrated=True, ranks=ranks)
    if others and all(plan.slides for plan in others):
        raise InvalidArgument(
            "The window of this method slides by a tolerance of its own. It has no number of iterations to fix. "
            "Compile with method='auto' or a method without a window, and calibrate that."
        )
    limit = pricing.of(sequential, 1)

    def may_be_faster(plan: Plan) -> bool:
        """With the fewest iterations that may be enough."""
        return not plan.slides and pricing.network(plan, min(plan.max_iterations, plan.options.tried[0])) <= limit

    others = [plan for plan in others if may_be_faster(plan)]
    begins(1 + len(others))
    _, reference = run(sequential)[-1]
    enough: dict[Hashable, int] = {}
    for plan in others:
        try:
            outputs = run(fixed_at(plan, min(plan.options.tried[1], plan.max_iterations)))
        except (DivergenceError, torch.OutOfMemoryError):
            continue
        found = needed(outputs, reference, settings.tolerance, quantile)
        logger.debug(
            "Calibration: %s needs %s.", plan.short(), "more" if found is None else counted(found, "iteration")
        )
        if found is not None:
            enough[plan.signature] = found
    plan, _ = compare(num_steps, settings, stochastic, pricing, enough)
    return plan


def needed(outputs: Sequence[tuple[int, Tensor]], reference: Tensor, tolerance: float, quantile: float) -> int | None:
    """The first iteration from which on enough samples stay within the tolerance; None: not even the last are."""
    found = None
    must = math.ceil(quantile * len(reference))  # samples that must be within
    for iteration, samples in reversed(outputs):
        difference = (samples - reference).abs().double().flatten(1).mean(1)
        if not float(difference.sort().values[must - 1]) <= tolerance:
            break
        found = iteration
    return found
