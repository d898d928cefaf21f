"""Measured costs, made once for each kind of call and kept."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import telemetry
from ..errors import DivergenceError
from ..planner.context import context_of
from ..planner.cost_curve import CostCurve
from ..planner.plan import Plan
from ..planner.search import Known, Pricing
from ..schedulers.table import NoiseTable
from ..solvers.contract import Extras
from ..solvers.fixed_point.program import of_widths
from ..solvers.method import plain_steps
from ..solvers.program import Program
from .costs import WIDTHS, between_calls, measure
from .evaluator import Evaluator
from .graphs.device_lock import Busy, replays_here, turn
from .run import Run

MOST_KEPT = 64


class Costs:
    """Costs by kind of call, the least recently used given up first. May be used from several threads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Known] = OrderedDict()
        self._lock = threading.RLock()

    def of(self, key: Hashable, make: Callable[[], CostCurve]) -> Known:
        """Those of a kind, its curve measured now if it has not been."""
        key = key, torch.get_num_threads()
        with self._lock:  # also while it is measured: two at once would disturb each other
            found = self._kept.get(key)
            if found is None:
                found = self._kept[key] = Known(make())
                while len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return found

    def known(self, key: Hashable) -> bool:
        """Whether those of a kind have been measured."""
        with self._lock:
            return (key, torch.get_num_threads()) in self._kept

    def settle(self) -> None:
        """The plans that were chosen stand until more is learnt."""
        with self._lock:
            for known in self._kept.values():
                known.settle()

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()


def price(
    costs: Costs,
    key: Hashable,
    evaluator: Callable[[Program], Evaluator],
    state: Tensor,
    noise: NoiseTable,
    extras: Extras,
    dtype: torch.dtype,
    *,
    networks: Sequence[nn.Module] = (),
    max_rows: int | None = None,
    replayed: bool,
) -> Pricing:
    """What calls like one that is about to be made cost, measured if it is not known.

    Args:
        costs: what is known.
        key: of the kind of call, the state and the network's wishes apart.
        evaluator: makes what runs the waves of a program.
        state: starting noise, [batch, ...].
        noise, extras: of the call.
        dtype: of the network's output.
        networks: what is called.
        max_rows: widest call allowed.
        replayed: whether it will be replayed from graphs: nothing is then spent between calls.
    """

    def curve() -> CostCurve:
        widths = [width for width in WIDTHS if width <= (max_rows or width)]
        return measure(evaluator, of_widths(noise.num_steps, widths), state, extras.network, replayed=replayed)

    def between(plan: Plan) -> float:
        if known.curve.how == "replayed":
            return 0.0
        try:
            with telemetry.unseen():
                return between_calls(Run(plan, state, noise, "dry run", replace(extras, trajectory=None)).next, dtype)
        except (DivergenceError, torch.OutOfMemoryError):
            return math.inf

    # in the middle of a replay, or while others replay for long, calls are timed as Python makes them: known apart
    replayed = replayed and not replays_here(state.device)
    of_call = key, state.shape, state.device, extras.network, dtype, max_rows
    key = *of_call, replayed
    if replayed and not costs.known(key):
        try:
            # graphs of a device share their memory: to record is to write into what another call replays. The turn
            # comes first: who has it may be waiting for these costs
            with turn(state.device):
                costs.of(key, curve)
        except Busy:
            replayed = False
            key = *of_call, replayed
    known = costs.of(key, curve)
    return Pricing(known, between, context_of(state.device, noise, networks), key, plain_steps(noise))
