"""All updates padded to one width, so that the device can select one by number: for the reference with a counter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .update import Correction, Gather, Step, Update

Value = TypeVar("Value")


class Padded(NamedTuple):
    """Every update as wide as the widest, followed by an update that does nothing, for calls beyond the last one.

    Padding is harmless: it repeats the first step of an update, corrects slot 0 by nothing, and gathers no row.

    Attributes:
        steps: [updates + 1, 5, values], of each step: keep, state, row, slot of x0_prev, entry of the noise.
        takes: [updates + 1, 3, values, 1, ...] bool: the update has steps, looks back, has noise.
        numbers: [updates + 1, 7, values, 1, ...]: a, b, c, p, q, d, s.
        corrections: [updates + 1, 5, corrections], of each: slot, slots of G_new and G_old, compare, iteration.
        corrects: [updates + 1, 3, corrections] bool: has a bracket, is compared, is compared as the last boundary.
        slots: [updates + 1, rows], of the states that are gathered.
        gathers: [updates + 1, rows, 1, ...] bool: the row is gathered.
        scale: [updates + 1, rows, 1, ...], input scale of each row.
        scales_state, adds_m, scaled: whether any update has this term; if none has, it is left out as in `Columns`.
    """

    steps: Tensor
    takes: Tensor
    numbers: Tensor
    corrections: Tensor
    corrects: Tensor
    slots: Tensor
    gathers: Tensor
    scale: Tensor
    scales_state: bool
    adds_m: bool
    scaled: bool


def padded(updates: Sequence[Update], ndim: int, dtype: torch.dtype, device: torch.device) -> Padded:
    """Pad all updates. Each column is copied to the device once for all updates."""
    every = (*updates, Update())
    steps = _filled([each.steps for each in every], Step(0, 0, 0, 1.0, 0.0), again=True)
    corrections = _filled([each.corrections for each in every], Correction(0, None))
    gathers = _filled([each.gathers for each in every], Gather(0))
    takes = [[bool(update.steps)] * len(values) for update, values in zip(every, steps, strict=True)]
    is_gathered = [[row < len(update.gathers) for row in range(len(gathers[0]))] for update in every]

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
                for values in steps
            ]
        ),
        for_states(
            flags(
                [
                    [
                        is_taken,
                        [value.before is not None for value in values],
                        [value.draw is not None for value in values],
                    ]
                    for is_taken, values in zip(takes, steps, strict=True)
                ]
            )
        ),
        for_states(numbers([[[getattr(value, name) for value in values] for name in "abcpqds"] for values in steps])),
        integers(
            [
                [
                    [each.slot for each in values],
                    [each.bracket[0] if each.bracket else 0 for each in values],
                    [each.bracket[1] if each.bracket else 0 for each in values],
                    [each.compare or 0 for each in values],
                    [each.iteration for each in values],
                ]
                for values in corrections
            ]
        ),
        flags(
            [
                [
                    [each.bracket is not None for each in values],
                    [each.compare is not None for each in values],
                    [each.compare is not None and each.whole for each in values],
                ]
                for values in corrections
            ]
        ),
        integers([[each.slot for each in values] for values in gathers]),
        for_states(flags(is_gathered)),
        for_states(numbers([[each.scale for each in values] for values in gathers])),
        any(step.a != 1.0 for update in updates for step in update.steps),
        any(step.b != 0.0 for update in updates for step in update.steps),
        any(each.scale != 1.0 for update in updates for each in update.gathers),
    )


def _filled(stages: Sequence[tuple[Value, ...]], pad: Value, again: bool = False) -> list[list[Value]]:
    """One stage of each update, filled up to the longest: with the pad or, if `again`, with its own first entry."""
    longest = max(len(stage) for stage in stages)
    pads = [stage[0] if again and stage else pad for stage in stages]
    return [[*stage, *repeat(by, longest - len(stage))] for stage, by in zip(stages, pads, strict=True)]
