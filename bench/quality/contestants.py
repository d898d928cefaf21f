"""The methods that are compared, each with its settings for a number of steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from bench.workloads.methods import NEVER
from srds_fast.methods import SRDS as SrdsOptions
from srds_fast.planner.choose import choose, fixed_at
from srds_fast.planner.plan import Plan
from srds_fast.planner.settings import Settings
from srds_fast.solvers.chords import Chords
from srds_fast.solvers.collocation.options import Collocation
from srds_fast.solvers.fixed_point.options import ParaDiGMS, ParaTAA

PAPER, SRDS, DEFAULT = "srds, as published", "srds (default)", "collocation (default)"
# from loose to tight; ParaTAA's is absolute, ParaDiGMS's in standard deviations of DDPM's posterior
PARATAA_TOLERANCES = (0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
PARADIGMS_TOLERANCES = (0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
# of the sample itself, in units of x: from 2 grey levels to a fortieth; half a one is the default
TOLERANCES = tuple(levels / 127.5 for levels in (2, 0.5, 0.1, 0.025))


class Contestant(NamedTuple):
    """One method.

    Attributes:
        method: its name or options, or a function of the number of steps that returns them.
        tolerances: from loose to tight, of a method that stops each sample by itself: there is a run for each. Of a
            sliding window they are its step_tolerance. (): the method is stopped from outside, at an iteration.
        peer: it is timed by `bench.quality.peers` as well.
    """

    name: str
    method: Any
    tolerances: tuple[float, ...] = ()
    peer: bool = True

    def plan(self, steps: int, tolerance: float | None = None, iteration: int | None = None) -> Plan:
        """Its plan, with one of its tolerances where it has some, or to end with this iteration."""
        settings = Settings(method=self.method(steps) if callable(self.method) else self.method, tolerance=NEVER)
        plan = choose(steps, settings)
        if iteration is not None:
            return fixed_at(plan, min(iteration, plan.max_iterations))
        if tolerance is None:
            return plan
        if plan.slides:
            return replace(plan, options=replace(plan.options, step_tolerance=tolerance))
        # chosen anew, as other settings of a plan follow from its tolerance
        return choose(steps, replace(settings, tolerance=tolerance))


CONTESTANTS: dict[str, Contestant] = {
    each.name: each
    for each in (
        Contestant(PAPER, SrdsOptions.published),
        Contestant(SRDS, "srds"),
        Contestant(f"{SRDS}, stops itself", "srds", TOLERANCES),
        Contestant(DEFAULT, Collocation()),
        Contestant(f"{DEFAULT}, stops itself", Collocation(), TOLERANCES),
        *(Contestant(f"collocation, cover 1 / {n}", Collocation(cover=n), peer=False) for n in (2, 3)),
        Contestant("parataa (default)", ParaTAA()),
        Contestant("parataa, as published", ParaTAA.published(), PARATAA_TOLERANCES),
        Contestant("paradigms, window 10", ParaDiGMS(window=10), PARADIGMS_TOLERANCES),
        Contestant("paradigms, window 25", ParaDiGMS(window=25), PARADIGMS_TOLERANCES),
        Contestant("paradigms, window 100", ParaDiGMS(window=100), PARADIGMS_TOLERANCES, peer=False),
        *(Contestant(f"chords, {cores} cores", Chords(num_cores=cores)) for cores in (4, 8)),
    )
}
