"""The default plan for a number of steps. No device is asked."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

from ..errors import InvalidArgument
from ..schedulers.steps import CoarseSolver
from ..solvers.chords.options import Chords
from ..solvers.fixed_point.options import Collocation, FixedPoint
from ..solvers.method import options_of
from .plan import Method, Plan
from .settings import Settings

# with fewer steps a second iteration already costs as many waves as the sequential sampler
FEWEST_STEPS_FOR_SRDS = 6
# of a fixed-point method that has not settled: by then it has cost more than the sequential sampler several times over
MOST_SWEEPS = 100


def choose(num_steps: int, settings: Settings, stochastic: bool = False) -> Plan:
    """The plan for N steps. No device is asked: blocks and coarse solver follow the settings, or the defaults below.

    Defaults: the 2M jump, and blocks of about sqrt(N) / 2 steps. Pipelined, iteration p is ready after p * S + B - p
    waves, so for the one or two iterations that the 2M jump needs, more and shorter blocks than the paper's sqrt(N)
    are better on both counts: fewer waves and a closer coarse sweep. Where the scheduler's steps add noise
    (stochastic), x0 follows no line, and first-order jumps are several times closer after one iteration.

    Raises:
        InvalidArgument: more blocks than steps, or more iterations than blocks.
    """
    method, options = options_of(settings.method)
    if method == "auto":
        method = "srds" if num_steps >= FEWEST_STEPS_FOR_SRDS else "sequential"
    bits_only = settings.exact or settings.tolerance == 0
    blocks, most = 1, num_steps if bits_only else min(num_steps, MOST_SWEEPS)
    if method == "srds":
        blocks = settings.num_blocks or max(1, round(num_steps / max(2, round(math.sqrt(num_steps) / 2))))
        if blocks > num_steps:
            raise InvalidArgument(
                f"num_blocks is {blocks} for {num_steps} steps. A block holds at least one step. "
                f"Pass at most {num_steps}, or leave it out."
            )
        most = blocks
    elif isinstance(options, Collocation):
        options = options.with_nodes(0.0 if settings.exact else settings.tolerance)
    elif isinstance(options, Chords):
        starts = options.starts
        if starts is not None and starts[-1] >= num_steps:
            raise InvalidArgument(
                f"A core begins at step {starts[-1]}, and there are {num_steps} steps. It would have none to take. "
                "Pass other starts, or leave them out."
            )
        options = replace(options, num_cores=min(options.num_cores, num_steps))
        most = options.num_cores - 1
    elif method == "sequential":
        most = 1
    coarse_solver = settings.coarse_solver
    if coarse_solver == "auto":
        coarse_solver = "ddim" if stochastic else "2m"
    iterations = most if settings.exact or settings.max_iterations is None else min(settings.max_iterations, most)
    if isinstance(options, FixedPoint):
        iterations = max(1, iterations)
    return Plan(
        method=cast(Method, method),
        num_inference_steps=num_steps,
        num_blocks=blocks,
        max_iterations=iterations,
        coarse_solver=cast(CoarseSolver, coarse_solver),
        pipelined=settings.pipelined,
        max_rows=settings.max_rows,
        engine=settings.engine,
        tolerance=float(settings.tolerance),
        exact=settings.exact,
        options=options,
        in_flight=settings.in_flight if method == "srds" else None,
    )
