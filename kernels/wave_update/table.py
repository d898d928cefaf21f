"""What happens between two network calls, as data: the rows of a table that a kernel walks and the reference batches.

Values live in the slots of one memory, [slots, samples, ...]; what a slot holds at which time is the caller's business.
An update has three stages, each reading what the ones before have left:

1. *made* values, from a state, a row of the network's output and what was kept before:
   x' = a x + b m + c clamp(p x + q m) + d x0_prev + s z
2. *sums*, F + (G_new - G_old), the Parareal correction of a boundary (Selvam et al. 2024, equation 8), in that order:
   the bracket is bitwise zero once its two terms agree, and F is then left untouched; and how far the boundary has
   moved since the iteration before
3. the states that *enter* the next network call, times their input scale

Within a stage the order does not matter: no value is written twice, and none reads what another one of its stage
writes, but for sums: they run in order, and one may read what an earlier one has written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from srds_fast.errors import InvalidArgument

from .batched import Batch, batches
from .chains import Chains, chains


class Made(NamedTuple):
    """x' = a x + b m + c clamp(p x + q m) + d x0_prev + s z.

    Attributes:
        keep: slot of x'.
        state: slot of x.
        row: of the network's output m.
        a, b, c, d, p, q, s: coefficients; c is 0 where the table has no clip.
        before: slot of x0_prev; None: no such term.
        draw: entry of the noise z; None: no such term.
    """

    keep: int
    state: int
    row: int
    a: float
    b: float
    c: float = 0.0
    d: float = 0.0
    p: float = 0.0
    q: float = 0.0
    before: int | None = None
    draw: int | None = None
    s: float = 0.0


class Summed(NamedTuple):
    """F + (G_new - G_old), in the slot of F.

    Attributes:
        slot: of F, and of the result.
        bracket: slots of G_new and G_old; None: F is the result.
        compare: slot of the same boundary an iteration before; None: it is not compared.
        iteration: the one that makes this value.
        whole: it is the last boundary, whose mean absolute change is wanted; of others, whether a bit has moved.
    """

    slot: int
    bracket: tuple[int, int] | None
    compare: int | None = None
    iteration: int = 0
    whole: bool = False


class Entering(NamedTuple):
    """A row of the next network call: the slot of its state, and its input scale."""

    slot: int
    scale: float = 1.0


class Update(NamedTuple):
    """All that happens between two network calls."""

    made: tuple[Made, ...] = ()
    sums: tuple[Summed, ...] = ()
    entering: tuple[Entering, ...] = ()


class WaveTable:
    """The updates of a program, and the tensors made from them. Made once, shared by all runs.

    Args:
        updates: in the order they run.
        num_slots: slots of the memory they refer to.
        num_iterations: the largest iteration of a sum.
        dtype: of the memory, float32 or float64; coefficients are cast to it once.
        device: of the memory.
        ndim: dimensions of a state with its samples, [samples, ...].
        clip: bound of p x + q m, or None.
        watches: note for every sum that is compared whether a bit has moved.

    Raises:
        InvalidArgument: an update breaks a rule above.
    """

    def __init__(
        self,
        updates: Sequence[Update],
        num_slots: int,
        num_iterations: int,
        dtype: torch.dtype,
        device: torch.device,
        ndim: int,
        clip: float | None = None,
        watches: bool = False,
    ) -> None:
        for number, update in enumerate(updates):
            _check(number, update)
        self.updates = tuple(updates)
        self.num_slots = num_slots
        self.num_iterations = num_iterations
        self.dtype = dtype
        # "cuda" is the device of no tensor, "cuda:0" is
        self.device = torch.empty(0, device=device).device
        self.ndim = ndim
        self.clip = clip
        made = [value for update in updates for value in update.made]
        self.looks_back = any(value.before is not None for value in made)
        self.draws = max((value.draw + 1 for value in made if value.draw is not None), default=0)
        self.watches = watches
        self.num_rows = [1 + max((value.row for value in update.made), default=-1) for update in updates]
        self.most_rows = max(self.num_rows)
        self.most_entering = max(len(update.entering) for update in updates)

    @cached_property
    def batches(self) -> list[Batch]:
        """For the reference: each stage of an update as a few batched operations."""
        return batches(self)

    @cached_property
    def chains(self) -> Chains:
        """For the kernel: instructions in chains that one program each can walk."""
        return chains(self)


def _check(number: int, update: Update) -> None:
    def refuse(what: str) -> None:
        raise InvalidArgument(f"updates[{number}] {what}. The rows of a stage run side by side. Use slots apart.")

    made = [value.keep for value in update.made]
    if len(set(made)) < len(made):
        refuse("makes two values in one slot")
    if set(made) & {slot for value in update.made for slot in (value.state, value.before)}:
        refuse("makes a value in a slot that another one is made from")
    later = [each.slot for each in update.sums]
    if len(set(later)) < len(later):
        refuse("has two sums in one slot")
    for each in update.sums:
        later.remove(each.slot)
        if set(later) & {*(each.bracket or ()), each.compare}:
            refuse("has a sum that reads what a later one writes")
    whole = [each.iteration for each in update.sums if each.whole and each.compare is not None]
    if whole and whole != list(range(whole[0], whole[0] + len(whole))):
        refuse("compares the last boundary in iterations that do not follow each other")
