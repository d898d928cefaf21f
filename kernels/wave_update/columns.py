"""An update as columns that broadcast over [values, samples, ...], for the reference."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.by_field import fields_of
from ..common.clamping import Clip
from .update import Gather, Step, Update


class Columns(NamedTuple):
    """One update. A term that no step of the table has is None: it is left out instead of multiplied by zero."""

    single: tuple[int, int] | None  # slots of the only step and of its state; None: there are none or several
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

    def split(lists: Sequence[Sequence[Any]], wanted: torch.dtype, *trailing: int) -> list[Tensor]:
        exact = torch.float64 if wanted.is_floating_point else wanted  # coefficients are rounded once
        flat = torch.tensor(list(chain.from_iterable(lists)), dtype=exact, device="cpu")
        return list(flat.to(wanted).to(device).reshape(-1, *trailing).split([len(each) for each in lists]))

    fields = [fields_of(Step, update.steps) for update in updates]
    gathered = [fields_of(Gather, update.gathers) for update in updates]

    def of_steps(name: str) -> list[tuple[Any, ...]]:
        index = Step._fields.index(name)
        return [each[index] for each in fields]

    # to make a tensor takes several microseconds, so those that no update uses are not made
    trailing, unused = [1] * ndim, [torch.empty(0, dtype=dtype, device=device)] * len(updates)
    several = any(len(keep) > 1 for keep, *_ in fields)
    keeps, states_read, rows_read = of_steps("keep"), of_steps("state"), of_steps("row")
    keep = split(keeps, torch.int64) if several else unused
    states = split(states_read, torch.int64) if several else unused
    other_rows = [found != tuple(range(len(found))) for found in rows_read]
    rows = split(rows_read, torch.int64) if any(other_rows) else unused
    scales_state = any(a != 1.0 for found in of_steps("a") for a in found)
    adds_m = any(b != 0.0 for found in of_steps("b") for b in found)
    a = split(of_steps("a"), dtype, *trailing) if scales_state else unused
    b = split(of_steps("b"), dtype, *trailing) if adds_m else unused
    c, p, q = (split(of_steps(name), dtype, *trailing) if clip is not None else unused for name in "cpq")
    looks_back = [
        [(slot, before, weight) for slot, terms in zip(*each, strict=True) for before, weight in terms]
        for each in zip(keeps, of_steps("looks_back"), strict=True)
    ]
    noises = [
        [(slot, draw, s) for slot, draw, s in zip(*each, strict=True) if draw is not None]
        for each in zip(keeps, of_steps("draw"), of_steps("s"), strict=True)
    ]
    from_memory = [not _gathers_steps(update) for update in updates]
    gathers = split([slots for slots, _ in gathered], torch.int64)
    scales = [factors for _, factors in gathered]
    scales_input = any(factor != 1.0 for found in scales for factor in found)
    scale = split(scales, dtype, *trailing) if scales_input else unused
    return [
        Columns(
            (keeps[n][0], states_read[n][0]) if len(keeps[n]) == 1 else None,
            keep[n],
            states[n],
            rows[n] if other_rows[n] else None,
            a[n] if scales_state else None,
            b[n] if adds_m else None,
            c[n] if clip is not None else None,
            p[n],
            q[n],
            looks_back[n],
            noises[n],
            gathers[n] if from_memory[n] else None,
            scale[n] if scales_input else None,
        )
        for n in range(len(updates))
    ]


def _gathers_steps(update: Update) -> bool:
    """Whether the next input is exactly what the batched formula gives: in its order, and with nothing added later."""
    kept, *_, looks_back, draws, _ = fields_of(Step, update.steps)
    slots, _ = fields_of(Gather, update.gathers)
    if not kept or kept != slots:
        return False
    later = {each.slot for each in update.corrections if each.bracket is not None}
    added = zip(kept, looks_back, draws, strict=True)
    later |= {slot for slot, before, draw in added if before or draw is not None}
    return later.isdisjoint(kept)
