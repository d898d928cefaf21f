"""Measured costs, made once for each kind of call and kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from .context import context_of
from .cost import CostCurve
from .engine.costs import WIDTHS, between_calls, measure
from .engine.graph import Evaluator
from .noise import NoiseTable
from .plan import Plan
from .program import Program, of_widths
from .run import Run
from .search import Known, Pricing
from .solvers.core import Extras

MOST_KEPT = 64


class Costs:
    """Costs by kind of call, the least recently used given up first. May be used from several threads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Known] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, key: Hashable, make: Callable[[], CostCurve]) -> Known:
        """Those of a kind, its curve measured now if it has not been."""
        key = key, torch.get_num_threads()
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        made = Known(make())
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return made


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
        replayed: whether it will be replayed from graphs: nothing is then spent between calls.
    """

    def curve() -> CostCurve:
        return measure(evaluator, of_widths(noise.num_steps, WIDTHS), state, extras.network, replayed=replayed)

    def between(plan: Plan) -> float:
        if known.curve.how == "replayed":
            return 0.0
        return between_calls(Run(plan, state, noise, "dry run", extras).next, dtype)

    key = key, state.shape, state.device, extras.network, dtype, replayed
    known = costs.of(key, curve)
    return Pricing(known, between, context_of(state.device, noise, networks))
