"""An update as columns that broadcast over [values, samples, ...], for the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .update import Update


class Columns(NamedTuple):
    """One update. A term that no step of the table has is None, so that it is left out instead of multiplied by zero.

    Attributes:
        keep, states: slots, of each step.
        rows: of the network's output, of each step; None: step i reads row i.
        a, b, c, p, q: coefficients, [steps, 1, ...].
        looks_back: keep, slot of x0_prev and d of each step that has one.
        noises: keep, entry of the noise and s of each step that has some.
        gathers: slots; None: the next input is what the steps make, in order.
        scale: input scale of each gather, [rows, 1, ...].
    """

    keep: Tensor
    states: Tensor
    rows: Tensor | None
    a: Tensor | None
    b: Tensor | None
    c: Tensor | None
    p: Tensor
    q: Tensor
    looks_back: list[tuple[int, int, float]]
    noises: list[tuple[int, int, float]]
    gathers: Tensor | None
    scale: Tensor | None


def columns(
    updates: Sequence[Update], ndim: int, dtype: torch.dtype, device: torch.device, clip: float | None
) -> list[Columns]:
    """The columns of all updates. Each column is copied to the device once for all updates."""
    ones = [1] * ndim

    def integers(lists: list[list[int]]) -> list[Tensor]:
        flat = torch.tensor([number for each in lists for number in each], dtype=torch.int64)
        return list(flat.to(device).split([len(each) for each in lists]))

    def numbers(lists: list[list[float]]) -> list[Tensor]:
        flat = torch.tensor([number for each in lists for number in each], dtype=torch.float64)
        return list(flat.to(dtype).to(device).reshape(-1, *ones).split([len(each) for each in lists]))

    every = [update.steps for update in updates]
    keep = integers([[step.keep for step in steps] for steps in every])
    states = integers([[step.state for step in steps] for steps in every])
    rows = integers([[step.row for step in steps] for steps in every])
    a, b, c, p, q = (numbers([[getattr(step, name) for step in steps] for steps in every]) for name in "abcpq")
    scales_state = any(step.a != 1.0 for steps in every for step in steps)
    adds_m = any(step.b != 0.0 for steps in every for step in steps)
    gathers = integers([[each.slot for each in update.gathers] for update in updates])
    scale = numbers([[each.scale for each in update.gathers] for update in updates])
    scaled = any(each.scale != 1.0 for update in updates for each in update.gathers)
    return [
        Columns(
            keep[n],
            states[n],
            None if [step.row for step in every[n]] == list(range(len(every[n]))) else rows[n],
            a[n] if scales_state else None,
            b[n] if adds_m else None,
            c[n] if clip is not None else None,
            p[n],
            q[n],
            [(step.keep, step.before, step.d) for step in every[n] if step.before is not None],
            [(step.keep, step.draw, step.s) for step in every[n] if step.draw is not None],
            None if _gathers_steps(update) else gathers[n],
            scale[n] if scaled else None,
        )
        for n, update in enumerate(updates)
    ]


def _gathers_steps(update: Update) -> bool:
    """Whether the next input is exactly what the batched formula gives: in its order, and with nothing added later."""
    later = {each.slot for each in update.corrections if each.bracket is not None}
    later |= {step.keep for step in update.steps if step.before is not None or step.draw is not None}
    kept = [step.keep for step in update.steps]
    return bool(kept) and kept == [each.slot for each in update.gathers] and not later & set(kept)
