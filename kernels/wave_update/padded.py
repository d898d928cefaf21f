"""The table as rows of one width that the device can pick by number, for the reference with a counter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .update import Entering, Made, Summed, Update

Value = TypeVar("Value")


class Padded(NamedTuple):
    """Every update as wide as the widest, and behind them one that does nothing, for what lies beyond the last.

    Pads do no harm: the first value of an update made again, a sum that is none in slot 0, a row that does not enter.

    Attributes:
        made: [updates + 1, 5, values], of each value made: keep, state, row, slot of x0_prev, entry of the noise.
        makes: [updates + 1, 3, values, 1, ...] bool: is made, looks back, has noise.
        numbers: [updates + 1, 7, values, 1, ...]: a, b, c, p, q, d, s.
        sums: [updates + 1, 5, sums], of each sum: slot, slots of G_new and G_old, compare, iteration.
        adds: [updates + 1, 3, sums] bool: has a bracket, is compared, is compared as the last boundary.
        entering: [updates + 1, rows], slots.
        enters: [updates + 1, rows, 1, ...] bool.
        scale: [updates + 1, rows, 1, ...], input scale of what enters.
        scales_state, adds_m, scaled: what no value of the table has is left out, as in `Batch`.
    """

    made: Tensor
    makes: Tensor
    numbers: Tensor
    sums: Tensor
    adds: Tensor
    entering: Tensor
    enters: Tensor
    scale: Tensor
    scales_state: bool
    adds_m: bool
    scaled: bool


def padded(updates: Sequence[Update], ndim: int, dtype: torch.dtype, device: torch.device) -> Padded:
    """The rows of all updates. One copy to the device for each column, not for each update."""
    every = (*updates, Update())
    made = _filled([each.made for each in every], Made(0, 0, 0, 1.0, 0.0), again=True)
    sums = _filled([each.sums for each in every], Summed(0, None))
    entering = _filled([each.entering for each in every], Entering(0))
    makes = [[bool(update.made)] * len(values) for update, values in zip(every, made, strict=True)]
    enters = [[row < len(update.entering) for row in range(len(entering[0]))] for update in every]

    def integers(columns: list[Any]) -> Tensor:
        return torch.tensor(columns, dtype=torch.int64).to(device)

    def flags(columns: list[Any]) -> Tensor:
        return torch.tensor(columns, dtype=torch.bool).to(device)

    def numbers(columns: list[Any]) -> Tensor:
        return torch.tensor(columns, dtype=torch.float64).to(dtype).to(device)

    def for_states(column: Tensor) -> Tensor:
        return column.reshape(*column.shape, *[1] * ndim)

    return Padded(
        integers(
            [
                [
                    [value.keep for value in values],
                    [value.state for value in values],
                    [value.row for value in values],
                    [value.before or 0 for value in values],
                    [value.draw or 0 for value in values],
                ]
                for values in made
            ]
        ),
        for_states(
            flags(
                [
                    [
                        is_made,
                        [value.before is not None for value in values],
                        [value.draw is not None for value in values],
                    ]
                    for is_made, values in zip(makes, made, strict=True)
                ]
            )
        ),
        for_states(numbers([[[getattr(value, name) for value in values] for name in "abcpqds"] for values in made])),
        integers(
            [
                [
                    [each.slot for each in values],
                    [each.bracket[0] if each.bracket else 0 for each in values],
                    [each.bracket[1] if each.bracket else 0 for each in values],
                    [each.compare or 0 for each in values],
                    [each.iteration for each in values],
                ]
                for values in sums
            ]
        ),
        flags(
            [
                [
                    [each.bracket is not None for each in values],
                    [each.compare is not None for each in values],
                    [each.compare is not None and each.whole for each in values],
                ]
                for values in sums
            ]
        ),
        integers([[each.slot for each in values] for values in entering]),
        for_states(flags(enters)),
        for_states(numbers([[each.scale for each in values] for values in entering])),
        any(value.a != 1.0 for update in updates for value in update.made),
        any(value.b != 0.0 for update in updates for value in update.made),
        any(each.scale != 1.0 for update in updates for each in update.entering),
    )


def _filled(stages: Sequence[tuple[Value, ...]], pad: Value, again: bool = False) -> list[list[Value]]:
    """One stage of each update, as long as the longest: with the pad, or with its first value again if it has one."""
    longest = max(len(stage) for stage in stages)
    pads = [stage[0] if again and stage else pad for stage in stages]
    return [[*stage, *repeat(by, longest - len(stage))] for stage, by in zip(stages, pads, strict=True)]
