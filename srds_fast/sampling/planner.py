"""The planner of a call: what is asked for, and what earlier calls have shown, in; the plan of the call out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from ..caches import Cache
from ..engine.costs import Costs
from ..engine.graphs.cache import Graphs
from ..engine.graphs.runner import GraphRunner
from ..errors import PlanMismatch
from ..planner.audit import Audit
from ..planner.choose import choose
from ..planner.context import Context
from ..planner.curve_cache import CurveCache
from ..planner.exploration import Exploration
from ..planner.first_stop import FirstStop
from ..planner.plan import Plan
from ..planner.search import Pricing, explored
from ..planner.settings import Settings
from ..schedulers.table import NoiseTable
from ..solvers.method import Method
from ..solvers.registry import options_of
from ..words import counted


def _stays(value: object) -> bool:
    """What a user has spent calls on."""
    return True


@dataclass
class Planner:
    """Chooses the plan of a call."""

    settings: Settings
    plan: Plan | None = None  # the user's plan; None: choose one
    costs: Costs = field(default_factory=Costs)  # measurements of earlier calls
    cache: CurveCache | None = None  # where measured costs are kept for other processes
    audits: Cache[Audit] = field(default_factory=partial(Cache, "audits", stays=_stays))  # by kind of call and of run
    learn_stop: bool = False  # whether calls learn when later ones may stop after the first iteration
    first_stops: Cache[FirstStop] = field(default_factory=partial(Cache, "first stops"))  # by the same
    # plans by number of steps, whether steps add noise, kind of calls as priced, and context
    calibrated: Cache[Plan] = field(default_factory=partial(Cache, "calibrated plans", stays=_stays))

    @property
    def engine(self) -> str:
        return self.settings.engine if self.plan is None else self.plan.engine

    @property
    def measures(self) -> bool:
        """Whether the plan of a call depends on what its network calls cost."""
        return self.plan is None and self.settings.measures

    def without_trials(self) -> Planner:
        """The same for calls that can run no other plans beside their own: predictions decide alone."""
        return replace(self, settings=replace(self.settings, explore=0.0))

    def fitting(self, noise: NoiseTable) -> Planner:
        """The same for calls with these steps, see `Settings.fitting`."""
        settings = self.settings.fitting(noise)
        return self if settings is self.settings else replace(self, settings=settings)

    @property
    def max_rows(self) -> int | None:
        return self.settings.max_rows if self.plan is None else self.plan.max_rows

    @property
    def options(self) -> Method | None:
        """The options of the method asked for; None where the planner chooses it."""
        return options_of(self.settings.method) if self.plan is None else self.plan.options

    def graph_runner(
        self,
        graphs: Graphs,
        on_gpu: bool,
        lazy: bool,
        refused: Callable[[str], None],
        whole: bool = False,
        shared: bool = False,
    ) -> GraphRunner | None:
        """How a call may use graphs; None: it runs eagerly.

        on_gpu: whether graphs can save time. shared: whether several ranks make the call.
        """
        auto = self.engine == "auto"
        if self.engine == "eager" or (auto and not on_gpu):
            return None
        kind, no_loop = "graph" if auto else self.engine, None
        if shared:
            no_loop = "the ranks tell each other how they fare while the call runs, which no graph of the loop can hold"
        return GraphRunner(graphs, lazy, refused, whole, weighed=auto, kind=kind, no_loop=no_loop)

    def choose(
        self,
        num_steps: int,
        stochastic: bool,
        pricing: Callable[[], Pricing] | None = None,
        context: Callable[[], Context] | None = None,
    ) -> tuple[Plan, Exploration | None]:
        """The plan of a call, and the exploration it comes from; PlanMismatch if the plan given is for other steps.

        pricing: measures the cost of the call; None: that is impossible before the call. context: of the call, with
            what a calibrated plan depends on; None: that of its costs.
        """
        if self.plan is not None:
            if self.plan.num_inference_steps != num_steps:
                raise PlanMismatch(
                    f"The plan is for {counted(self.plan.num_inference_steps, 'step')}, this call has {num_steps}. A "
                    "plan is valid for one number of steps. Leave plan out, or make one for this number."
                )
            return self.plan, None
        if pricing is not None:
            if self.has_calibrated(num_steps, stochastic):
                here = pricing().context if context is None else context()
                plan = self.calibrated.get((num_steps, stochastic, pricing().kind, here))
                if plan is not None:
                    return plan, None  # valid for calls of its own kind only
            if self.settings.measures:
                found = explored(num_steps, self.settings, stochastic, pricing())
                return found.plan, found
        return choose(num_steps, self.settings, stochastic), None

    def has_calibrated(self, num_steps: int, stochastic: bool) -> bool:
        """Whether a plan was calibrated for so many steps, of whichever kind of calls."""
        return any(cast(Any, key)[:2] == (num_steps, stochastic) for key in self.calibrated)
