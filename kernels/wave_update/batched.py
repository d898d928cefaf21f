"""The table as columns that broadcast over [values, samples, ...], for the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .table import Summed, Update, WaveTable


class Batch(NamedTuple):
    """One update. Terms that no value of the table has are None: they are left out, not multiplied by zero.

    Attributes:
        keep, states: slots, of each value made.
        rows: of the network's output, of each value made; None where every row makes one, in order.
        a, b, c, p, q: coefficients, [values, 1, ...].
        look_back: which values have an x0_prev, its slots and coefficients d.
        noises: which values have noise, its entries and coefficients s.
        sums: as they are.
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
    look_back: Terms | None
    noises: Terms | None
    sums: tuple[Summed, ...]
    entering: Tensor | None
    scale: Tensor | None


class Terms(NamedTuple):
    """A term that some of the values have: which values (None: all), what it is read from, and its coefficients."""

    values: Tensor | None
    reads: Tensor
    coefficients: Tensor


def batches(table: WaveTable) -> list[Batch]:
    """The batches of all updates. One copy to the device for each column, not for each update."""
    ones = [1] * table.ndim

    def integers(lists: list[list[int]]) -> list[Tensor]:
        flat = torch.tensor([number for each in lists for number in each], dtype=torch.int64)
        return list(flat.to(table.device).split([len(each) for each in lists]))

    def columns(lists: list[list[float]]) -> list[Tensor]:
        flat = torch.tensor([number for each in lists for number in each], dtype=torch.float64)
        return list(flat.to(table.dtype).to(table.device).reshape(-1, *ones).split([len(each) for each in lists]))

    updates = table.updates
    made = [update.made for update in updates]
    every = [value for values in made for value in values]
    keep = integers([[value.keep for value in values] for values in made])
    states = integers([[value.state for value in values] for values in made])
    rows = integers([[value.row for value in values] for values in made])
    a, b, c, p, q = (columns([[getattr(value, name) for value in values] for values in made]) for name in "abcpq")
    scales_state = any(value.a != 1.0 for value in every)
    adds_m = any(value.b != 0.0 for value in every)
    before = [[(n, v.before, v.d) for n, v in enumerate(values) if v.before is not None] for values in made]
    draws = [[(n, v.draw, v.s) for n, v in enumerate(values) if v.draw is not None] for values in made]

    def terms(found: list[list[tuple[int, int, float]]]) -> list[Terms | None]:
        which = integers([[value for value, _, _ in each] for each in found])
        reads = integers([[read for _, read, _ in each] for each in found])
        coefficients = columns([[number for _, _, number in each] for each in found])
        return [
            Terms(None if len(each) == len(values) else values_of, reads_of, numbers) if each else None
            for each, values, values_of, reads_of, numbers in zip(found, made, which, reads, coefficients, strict=True)
        ]

    look_back, noises = terms(before), terms(draws)
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
            c[n] if table.clip is not None else None,
            p[n],
            q[n],
            look_back[n],
            noises[n],
            update.sums,
            None if _enters_as_made(update) else entering[n],
            scale[n] if scaled else None,
        )
        for n, update in enumerate(updates)
    ]


def _enters_as_made(update: Update) -> bool:
    corrected = {each.slot for each in update.sums if each.bracket is not None}
    made = [value.keep for value in update.made]
    return bool(made) and made == [each.slot for each in update.entering] and not corrected & set(made)
