"""The methods that are compared, each with its settings for a number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from bench.workloads.methods import NEVER
from srds_fast.methods import Method
from srds_fast.planner.choose import choose
from srds_fast.planner.plan import Plan
from srds_fast.planner.settings import Settings
from srds_fast.solvers.chords import Chords
from srds_fast.solvers.fixed_point.options import Collocation, FixedPoint, ParaDiGMS, ParaTAA

PAPER, DEFAULT = "srds, as published", "collocation (default)"
SRDS = "srds (default)"
SELF_STOPPING = f"{DEFAULT}, stops itself"
# of collocation at the default tolerance; and others
DEFAULT_NODES = Collocation().with_defaults(Settings().target(0)).num_nodes
NODES = (12, 16, 32)
CORES = (4, 8)
WINDOWS = (10, 25, 100)
# from loose to tight; ParaTAA's is absolute, ParaDiGMS's in standard deviations of DDPM's posterior
PARATAA_TOLERANCES = (0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
PARADIGMS_TOLERANCES = (0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
# of the sample itself, in units of x: from 2 grey levels to a fortieth; half a one is the default
TOLERANCES = tuple(levels / 127.5 for levels in (2, 0.5, 0.1, 0.025))


class Contestant(NamedTuple):
    """One method.

    Attributes:
        name: for tables.
        settings: of a number of steps.
        tolerances: from loose to tight, of a method that stops each sample by itself: there is a run for each. Of a
            sliding window they are its step_tolerance. (): the method is stopped from outside, at an iteration.
    """

    name: str
    settings: Callable[[int], Settings]
    tolerances: tuple[float, ...] = ()

    def plan(self, steps: int, tolerance: float | None = None) -> Plan:
        """Its plan, with one of its tolerances where it has some."""
        settings = self.settings(steps)
        plan = choose(steps, settings)
        if tolerance is None:
            return plan
        if isinstance(plan.options, FixedPoint) and plan.slides:
            return replace(plan, options=replace(plan.options, step_tolerance=tolerance))
        # chosen anew, as other settings of a plan follow from its tolerance
        return choose(steps, replace(settings, tolerance=tolerance))


def _contestant(name: str, method: str | Method, tolerances: tuple[float, ...] = ()) -> Contestant:
    return Contestant(name, lambda steps: Settings(method=method, tolerance=NEVER), tolerances)


def _as_published(steps: int) -> Settings:
    blocks = max(1, round(math.sqrt(steps)))
    return Settings(method="srds", tolerance=NEVER, coarse_solver="ddim", num_blocks=blocks)


CONTESTANTS: dict[str, Contestant] = {
    each.name: each
    for each in (
        Contestant(PAPER, _as_published),
        _contestant(SRDS, "srds"),
        _contestant(f"{SRDS}, stops itself", "srds", TOLERANCES),
        _contestant(DEFAULT, Collocation(num_nodes=DEFAULT_NODES)),
        _contestant(SELF_STOPPING, Collocation(), TOLERANCES),
        *(_contestant(f"collocation, {nodes} nodes", Collocation(num_nodes=nodes)) for nodes in NODES),
        _contestant("parataa (default)", ParaTAA()),
        _contestant("parataa, as published", ParaTAA.published(), PARATAA_TOLERANCES),
        *(
            _contestant(f"paradigms, window {window}", ParaDiGMS(window=window), PARADIGMS_TOLERANCES)
            for window in WINDOWS
        ),
        *(_contestant(f"chords, {cores} cores", Chords(num_cores=cores)) for cores in CORES),
    )
}
