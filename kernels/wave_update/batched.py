"""The table as columns that broadcast over [values, samples, ...], for the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .update import Update


class Batch(NamedTuple):
    """One update. Terms that no value of the table has are None: they are left out, not multiplied by zero.

    Attributes:
        keep, states: slots, of each value made.
        rows: of the network's output, of each value made; None where every row makes one, in order.
        a, b, c, p, q: coefficients, [values, 1, ...].
        looks_back: keep, slot of x0_prev and d of each value that has one.
        noises: keep, entry of the noise and s of each value that has some.
        entering: slots; None where the values made are what enters, in order.
        scale: input scale of what enters, [rows, 1, ...].
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
    entering: Tensor | None
    scale: Tensor | None


def batches(
    updates: Sequence[Update], ndim: int, dtype: torch.dtype, device: torch.device, clip: float | None
) -> list[Batch]:
    """The batches of all updates. One copy to the device for each column, not for each update."""
    ones = [1] * ndim

    def integers(lists: list[list[int]]) -> list[Tensor]:
        flat = torch.tensor([number for each in lists for number in each], dtype=torch.int64)
        return list(flat.to(device).split([len(each) for each in lists]))

    def columns(lists: list[list[float]]) -> list[Tensor]:
        flat = torch.tensor([number for each in lists for number in each], dtype=torch.float64)
        return list(flat.to(dtype).to(device).reshape(-1, *ones).split([len(each) for each in lists]))

    made = [update.made for update in updates]
    every = [value for values in made for value in values]
    keep = integers([[value.keep for value in values] for values in made])
    states = integers([[value.state for value in values] for values in made])
    rows = integers([[value.row for value in values] for values in made])
    a, b, c, p, q = (columns([[getattr(value, name) for value in values] for values in made]) for name in "abcpq")
    scales_state = any(value.a != 1.0 for value in every)
    adds_m = any(value.b != 0.0 for value in every)
    entering = integers([[each.slot for each in update.entering] for update in updates])
    scale = columns([[each.scale for each in update.entering] for update in updates])
    scaled = any(each.scale != 1.0 for update in updates for each in update.entering)
    return [
        Batch(
            keep[n],
            states[n],
            None if [value.row for value in made[n]] == list(range(len(made[n]))) else rows[n],
            a[n] if scales_state else None,
            b[n] if adds_m else None,
            c[n] if clip is not None else None,
            p[n],
            q[n],
            [(value.keep, value.before, value.d) for value in made[n] if value.before is not None],
            [(value.keep, value.draw, value.s) for value in made[n] if value.draw is not None],
            None if _enters_as_made(update) else entering[n],
            scale[n] if scaled else None,
        )
        for n, update in enumerate(updates)
    ]


def _enters_as_made(update: Update) -> bool:
    """What enters is what the batched formula gives, in its order, with nothing added to it later."""
    later = {each.slot for each in update.sums if each.bracket is not None}
    later |= {value.keep for value in update.made if value.before is not None or value.draw is not None}
    made = [value.keep for value in update.made]
    return bool(made) and made == [each.slot for each in update.entering] and not later & set(made)
