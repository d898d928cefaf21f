"""When the run of a call may stop: by its estimated error, and by what calls and runs like it have shown."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from ..planner.audit import Audit
from ..planner.experience import kind_of_run
from ..planner.first_stop import FirstStop
from ..planner.plan import Plan
from ..solvers.convergence import Contraction
from .network import Network
from .planner import Planner


@dataclass(frozen=True)
class StopRule:
    """How a run stops, and what is to be learnt of it.

    Attributes:
        contraction: how errors are estimated.
        factor: of the tolerance, which estimated errors are compared with.
        words: for the report; None: nothing was learnt.
        audit: what was learnt by comparing samples with the sequential ones; None if nothing can be.
        first_stop: what earlier calls tell of the stop after iteration 1; None if the call does not ask.
    """

    contraction: Contraction
    factor: float = 1.0
    words: str | None = None
    audit: Audit | None = None
    first_stop: FirstStop | None = None

    def record(self, change: Sequence[Sequence[float | None]]) -> None:
        """Learn from a run that has ended as planned. change: see `Report.change`."""
        if self.first_stop is not None:
            self.first_stop.record(change)


def stop_rule(
    planner: Planner, network: Network | None, plan: Plan, shape: torch.Size, *, audited: bool, stochastic: bool
) -> StopRule:
    """The rule of a run. network: None where the caller evaluates the waves. shape: of the state, [batch, ...].

    audited: whether the call is compared with the sequential one. Audits tell more than changes do, so these go first.
    stochastic: whether steps add noise.
    """
    contraction = plan.options.contraction_of(stochastic=stochastic)
    if network is None or plan.bitwise:
        return StopRule(contraction)

    def kind() -> Hashable:
        """Of calls and runs that stop alike."""
        return network.kind, network.conditions, shape, stochastic, kind_of_run(replace(plan, calibrated=False))

    if (audited or planner.audits) and not plan.is_sequential and not plan.slides:
        key = kind()
        audit = planner.audits.setdefault(key, Audit(plan.tolerance)) if audited else planner.audits.get(key)
        if audit is not None:
            return StopRule(contraction, audit.factor, audit.rule, audit)
    if planner.learn_stop and plan.options.learns_first_stop and not plan.calibrated:
        first_stop = planner.first_stops.setdefault(kind(), FirstStop())
        contraction, words = first_stop.next_call(contraction)
        return StopRule(contraction, words=words, first_stop=first_stop)
    return StopRule(contraction)
