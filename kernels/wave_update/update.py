"""What happens between two network calls, as data.

Values live in the slots of one memory, [slots, samples, ...]; what a slot holds at which time is the caller's business.
An update has three stages, each reading what the ones before have left:

1. *made* values, from a state, a row of the network's output and what was kept before:
   x' = a x + b m + c clamp(p x + q m) + d x0_prev + s z
2. *sums*, F + (G_new - G_old), the Parareal correction of a boundary (Selvam et al. 2024, algorithm 1), in that order:
   the bracket is bitwise zero once its two terms agree, and F is then left untouched; and how far the boundary has
   moved since the iteration before
3. the states that *enter* the next network call, times their input scale

Within a stage the order does not matter: no value is written twice, and none reads what another one of its stage
writes, but for sums: they run in order, and one may read what an earlier one has written.
"""

from __future__ import annotations

from typing import NamedTuple

from srds_fast.errors import InvalidArgument


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


def check(number: int, update: Update, num_slots: int, num_iterations: int, clips: bool) -> None:
    """Raise InvalidArgument if update `number` breaks a rule above, or is not for so many slots and iterations."""

    def refuse(what: str) -> None:
        raise InvalidArgument(f"updates[{number}] {what}. The rows of a stage run side by side. Use slots apart.")

    slots = [slot for value in update.made for slot in (value.keep, value.state, value.before)]
    slots += [slot for each in update.sums for slot in (each.slot, each.compare, *(each.bracket or ()))]
    slots += [each.slot for each in update.entering]
    beyond = [slot for slot in slots if slot is not None and not 0 <= slot < num_slots]
    beyond += [each.iteration for each in update.sums if not 0 <= each.iteration <= num_iterations]
    beyond += [each for value in update.made for each in (value.row, value.draw or 0) if each < 0]
    if beyond:
        raise InvalidArgument(
            f"updates[{number}] names {beyond[0]}. The table has {num_slots} slots and {num_iterations} iterations, "
            "and rows count from 0. Name one of them."
        )
    if not clips and any(value.c != 0.0 for value in update.made):
        raise InvalidArgument(
            f"updates[{number}] has a clipped term. The table has no clip. Give it one, or fold c p into a, c q into b."
        )
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
