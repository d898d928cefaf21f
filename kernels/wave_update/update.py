"""What happens between two network calls, as data.

Values lie in the slots of one memory, [slots, samples, ...]; the caller decides what a slot holds at which time. An
update has three stages. Each stage reads what the stages before it have written:

1. *steps* make values from a state, a row of the network's output and what was kept before:
   x' = a x + b m + c clamp(p x + q m) + sum_k d_k v_k + s z, v_k what earlier steps have left, as their x0
2. *corrections*, F + (G_new - G_old), are the Parareal correction of a boundary (Selvam et al. 2024, algorithm 1), in
   that order: the bracket is bitwise zero once its two terms agree, and then leaves F untouched. They also measure how
   far the boundary has moved since the iteration before.
3. *gathers* copy states, times their input scale, to the rows of the next network call.

The order within a stage does not matter: no slot is written twice in it, and no entry reads what another one of its
stage writes. Corrections are the exception: they run in order, and one may read what an earlier one has written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from srds_fast.errors import InvalidArgument
from srds_fast.words import counted

from ..common.by_field import fields_of


class Step(NamedTuple):
    """x' = a x + b m + c clamp(p x + q m) + sum_k d_k v_k + s z."""

    keep: int  # slot of x'
    state: int  # slot of x
    row: int  # of the network's output m
    a: float
    b: float
    c: float = 0.0  # 0 if the table has no clip
    p: float = 0.0
    q: float = 0.0
    looks_back: tuple[tuple[int, float], ...] = ()  # slot and weight of each v_k
    draw: int | None = None  # entry of the noise z; None: no such term
    s: float = 0.0

    def reads(self) -> list[int]:
        return [self.state, *(slot for slot, _ in self.looks_back)]


class Correction(NamedTuple):
    """F + (G_new - G_old), written to the slot of F."""

    slot: int  # of F and of the result
    bracket: tuple[int, int] | None  # slots of G_new and G_old; None: F is the result
    compare: int | None = None  # slot of the same boundary an iteration before; None: it is not compared
    iteration: int = 0  # the one that makes this value
    change: int | None = None  # entry of `Buffers.change` for its mean absolute change; None: it is not measured


class Gather(NamedTuple):
    """A row of the next network call: the slot of its state, and its input scale."""

    slot: int
    scale: float = 1.0


class Update(NamedTuple):
    steps: Sequence[Step] = ()
    corrections: Sequence[Correction] = ()
    gathers: Sequence[Gather] = ()

    def measured(self) -> list[int]:
        """The entries of `Buffers.change` that it writes."""
        return [each.change for each in self.corrections if each.change is not None]


def check(number: int, update: Update, num_slots: int, num_iterations: int, clips: bool) -> None:
    """Raise InvalidArgument if update `number` breaks a rule above, or names what does not exist."""

    def refuse(what: str) -> None:
        raise InvalidArgument(f"updates[{number}] {what}. The entries of a stage run side by side. Use other slots.")

    keep, state, row, _, _, c, _, _, looks_back, draw, _ = fields_of(Step, update.steps)
    before = [slot for terms in looks_back for slot, _ in terms]
    corrections, (gathered, _) = update.corrections, fields_of(Gather, update.gathers)
    slots = [*keep, *state, *before, *gathered]
    slots += [slot for each in corrections for slot in (each.slot, each.compare, *(each.bracket or ()))]
    beyond = [slot for slot in slots if slot is not None and not 0 <= slot < num_slots]
    beyond += [each.iteration for each in corrections if not 0 <= each.iteration <= num_iterations]
    beyond += [each for each in (*row, *draw) if each is not None and each < 0]
    if beyond:
        raise InvalidArgument(
            f"updates[{number}] names {beyond[0]}. The table has {counted(num_slots, 'slot')} and "
            f"{counted(num_iterations, 'iteration')}, and rows count from 0. Name one of them."
        )
    if not clips and any(c):
        raise InvalidArgument(
            f"updates[{number}] has a clipped term. The table has no clip. Give it one, or fold c p into a, c q into b."
        )
    kept = set(keep)
    if len(kept) < len(keep):
        refuse("writes two steps to one slot")
    if not kept.isdisjoint((*state, *before)):
        refuse("writes a step to a slot that another step reads")
    later = [each.slot for each in corrections]
    if len(set(later)) < len(later):
        refuse("has two corrections in one slot")
    reads = {step.keep: step.reads() for step in update.steps if step.keep in later} if kept & set(later) else {}
    for each in corrections:
        later.remove(each.slot)
        if set(later) & {*(each.bracket or ()), each.compare}:
            refuse("has a correction that reads what a later one writes")
        if any(each.slot in reads.get(slot, ()) for slot in later):
            # the kernel makes and corrects a value at once
            refuse("has a correction of the state of a step that a later one corrects")
    measured = update.measured()
    if measured and measured != list(range(measured[0], measured[0] + len(measured))):
        refuse("measures changes whose entries are not consecutive")
    if any(each.compare is None for each in corrections if each.change is not None):
        refuse("measures the change of a value that it does not compare")
