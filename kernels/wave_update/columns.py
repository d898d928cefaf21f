"""An update as columns that broadcast over [values, samples, ...], for the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.clamping import Clip
from .update import Update


class Columns(NamedTuple):
    """One update. A term that no step of the table has is None: it is left out instead of multiplied by zero."""

    keep: Tensor  # slot of each step
    states: Tensor  # slot of each step
    rows: Tensor | None  # of the network's output, of each step; None: step i reads row i
    a: Tensor | None  # coefficients, [steps, 1, ...], as b, c, p and q
    b: Tensor | None
    c: Tensor | None
    p: Tensor
    q: Tensor
    looks_back: list[tuple[int, int, float]]  # keep, slot and weight of everything that steps look back at
    noises: list[tuple[int, int, float]]  # keep, entry of the noise and s of each step that has some
    gathers: Tensor | None  # slots; None: the next input is what the steps make, in order
    scale: Tensor | None  # input scale of each gather, [rows, 1, ...]


def columns(
    updates: Sequence[Update], ndim: int, dtype: torch.dtype, device: torch.device, clip: Clip | None
) -> list[Columns]:
    """The columns of all updates. Each column is copied to the device once for all updates."""

    def split(lists: list[list[Any]], wanted: torch.dtype, *trailing: int) -> list[Tensor]:
        exact = torch.float64 if wanted.is_floating_point else wanted  # coefficients are rounded once
        flat = torch.tensor([number for each in lists for number in each], dtype=exact, device="cpu")
        return list(flat.to(wanted).to(device).reshape(-1, *trailing).split([len(each) for each in lists]))

    def of_steps(name: str) -> list[list[Any]]:
        return [[getattr(step, name) for step in update.steps] for update in updates]

    trailing = [1] * ndim
    keep, states, rows = (split(of_steps(name), torch.int64) for name in ("keep", "state", "row"))
    a, b, c, p, q = (split(of_steps(name), dtype, *trailing) for name in "abcpq")
    gathers = split([[each.slot for each in update.gathers] for update in updates], torch.int64)
    scale = split([[each.scale for each in update.gathers] for update in updates], dtype, *trailing)
    scales_state = any(step.a != 1.0 for update in updates for step in update.steps)
    adds_m = any(step.b != 0.0 for update in updates for step in update.steps)
    scales_input = any(each.scale != 1.0 for update in updates for each in update.gathers)
    return [
        Columns(
            keep[n],
            states[n],
            None if [step.row for step in update.steps] == list(range(len(update.steps))) else rows[n],
            a[n] if scales_state else None,
            b[n] if adds_m else None,
            c[n] if clip is not None else None,
            p[n],
            q[n],
            [(step.keep, slot, weight) for step in update.steps for slot, weight in step.looks_back],
            [(step.keep, step.draw, step.s) for step in update.steps if step.draw is not None],
            None if _gathers_steps(update) else gathers[n],
            scale[n] if scales_input else None,
        )
        for n, update in enumerate(updates)
    ]


def _gathers_steps(update: Update) -> bool:
    """Whether the next input is exactly what the batched formula gives: in its order, and with nothing added later."""
    later = {each.slot for each in update.corrections if each.bracket is not None}
    later |= {step.keep for step in update.steps if step.looks_back or step.draw is not None}
    kept = [step.keep for step in update.steps]
    return bool(kept) and kept == [each.slot for each in update.gathers] and not later & set(kept)
