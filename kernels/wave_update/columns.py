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

    keep: Tensor  # slot of each step; empty if no update of the table has several
    states: Tensor  # slot of each step; empty as keep
    rows: Tensor | None  # of the network's output, of each step; None: step i reads row i
    a: Tensor | None  # coefficients, [steps, 1, ...], as b, c, p and q
    b: Tensor | None
    c: Tensor | None
    p: Tensor  # p and q are empty where c is None
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

    # to make a tensor takes several microseconds, so those that no update uses are not made
    trailing, unused = [1] * ndim, [torch.empty(0, dtype=dtype, device=device)] * len(updates)
    steps = [step for update in updates for step in update.steps]
    several = any(len(update.steps) > 1 for update in updates)
    keep, states = (split(of_steps(name), torch.int64) if several else unused for name in ("keep", "state"))
    other_rows = [[step.row for step in update.steps] != list(range(len(update.steps))) for update in updates]
    rows = split(of_steps("row"), torch.int64) if any(other_rows) else unused
    scales_state, adds_m = any(step.a != 1.0 for step in steps), any(step.b != 0.0 for step in steps)
    a = split(of_steps("a"), dtype, *trailing) if scales_state else unused
    b = split(of_steps("b"), dtype, *trailing) if adds_m else unused
    c, p, q = (split(of_steps(name), dtype, *trailing) if clip is not None else unused for name in "cpq")
    from_memory = [not _gathers_steps(update) for update in updates]
    gathers = split([[each.slot for each in update.gathers] for update in updates], torch.int64)
    scales_input = any(each.scale != 1.0 for update in updates for each in update.gathers)
    scales = [[each.scale for each in update.gathers] for update in updates]
    scale = split(scales, dtype, *trailing) if scales_input else unused
    return [
        Columns(
            keep[n],
            states[n],
            rows[n] if other_rows[n] else None,
            a[n] if scales_state else None,
            b[n] if adds_m else None,
            c[n] if clip is not None else None,
            p[n],
            q[n],
            [(step.keep, slot, weight) for step in update.steps for slot, weight in step.looks_back],
            [(step.keep, step.draw, step.s) for step in update.steps if step.draw is not None],
            gathers[n] if from_memory[n] else None,
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
