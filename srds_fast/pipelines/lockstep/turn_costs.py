"""What rows cost that turns of the loop make: their merged network calls, and the loop's own code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...engine.eager import Evaluator
from ...engine.merging.calls import MergedCalls
from ...engine.merging.rule import Call
from ...planner.plan import Plan
from ...planner.search import Pricing
from ...solvers.contract import Evaluate


class CallsOfTurns(Evaluator):
    """The network calls of a wave without the loop's own code; see `engine.eager.Evaluator`.

    turns: the calls of some turns, of the same kinds. Rows repeat them in turn.
    """

    def __init__(self, turns: Sequence[Sequence[Call]], merged: MergedCalls) -> None:
        self._turns, self._merged = turns, merged

    @torch.no_grad()
    def __call__(self, wave: Evaluate) -> Tensor:
        rows = [self._turns[row % len(self._turns)] for row in range(len(wave.positions))]
        for calls in zip(*rows, strict=True):
            self._merged(calls)
        return wave.x


def with_turns(pricing: Pricing, turn_seconds: float, turns_a_row: int) -> Pricing:
    """The costs of calls whose rows take so many turns of the loop each; a wave of one row takes a single turn."""

    def overhead(plan: Plan) -> float:
        widths = [len(wave.rows) for wave in plan.program().waves]
        turns = sum(1 if width == 1 else turns_a_row * width for width in widths)
        return pricing.measure_overhead(plan) + turn_seconds * turns

    return replace(pricing, measure_overhead=overhead)
