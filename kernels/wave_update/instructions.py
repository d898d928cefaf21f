"""An update as instructions for the kernel.

An instruction makes one value, and does everything that is done to it: a step that is corrected and gathered goes from
registers to each of its places, and is never read again. A step that looks back at several vectors is an instruction
for each, which adds it to what those before have made. An instruction forms a chain with those of the same update
that write what it reads, or read what it writes. One program walks a chain in order; chains run side by side.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .update import Update


class Instruction(NamedTuple):
    """One value; the fields are those of `Step`, `Correction` and `Gather`. -1: nothing to read or to write there.

    before, d: slot and weight of a vector that a step looks back at.
    """

    state: int
    row: int = -1
    before: int = -1
    draw: int = -1
    new: int = -1  # slots of the bracket's terms
    old: int = -1
    keep: int = -1
    input_row: int = -1  # of the next network call
    compare: int = -1
    iteration: int = 0
    change: int = -1
    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0
    s: float = 0.0
    p: float = 0.0
    q: float = 0.0
    clip: float = math.inf
    scale: float = 1.0

    def reads(self) -> set[int]:
        return {self.state, self.before, self.new, self.old, self.compare} - {-1}


NUM_WORDS = Instruction._fields.index("a")
NUM_NUMBERS = len(Instruction._fields) - NUM_WORDS


class Chains(NamedTuple):
    """The instructions of all updates, on the device; the counts are on the host."""

    words: Tensor  # [instructions, ...], the integers of each
    numbers: Tensor  # [instructions, ...], its coefficients
    starts: Tensor  # [chains + 1], the first instruction of each chain
    first: Tensor  # [updates + 1], the first chain of each update
    # [updates, 3], first and last entry of the changes that an update measures, 1 and 0 for none, and how many of its
    # chains measure one
    measured: Tensor
    counts: list[int]  # chains of each update
    measured_counts: list[int]  # changes of each update


def chains(updates: Sequence[Update], dtype: torch.dtype, device: torch.device, clip: float | None) -> Chains:
    of_updates = [chained(instructions(update, clip)) for update in updates]
    flat = [instruction for of_update in of_updates for chain in of_update for instruction in chain]
    lengths = [len(chain) for of_update in of_updates for chain in of_update]
    counts = [len(of_update) for of_update in of_updates]
    measured = [update.measured() for update in updates]
    measuring = [sum(any(each.change >= 0 for each in chain) for chain in of_update) for of_update in of_updates]

    def integers(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cpu").to(device)

    return Chains(
        integers([[int(word) for word in instruction[:NUM_WORDS]] for instruction in flat]).reshape(-1, NUM_WORDS),
        torch.tensor([instruction[NUM_WORDS:] for instruction in flat], dtype=torch.float64, device="cpu")
        .to(dtype)
        .to(device),
        integers(list(accumulate(lengths, initial=0))),
        integers(list(accumulate(counts, initial=0))),
        integers(
            [[*((found[0], found[-1]) if found else (1, 0)), by] for found, by in zip(measured, measuring, strict=True)]
        ),
        counts,
        list(map(len, measured)),
    )


def instructions(update: Update, clip: float | None = None) -> list[Instruction]:
    """The instructions of one update, in an order in which every value is written before it is read."""
    parts, found = list[Instruction](), dict[int, Instruction]()
    for step in update.steps:
        given = {name: -1 if value is None else value for name, value in step._asdict().items() if name != "looks_back"}
        made = Instruction(**given, clip=math.inf if clip is None else clip)
        for number, (slot, weight) in enumerate(step.looks_back):
            if number > 0:
                parts.append(made)
                made = Instruction(step.keep, keep=step.keep)
            made = made._replace(before=slot, d=weight)
        found[step.keep] = made
    for each in update.corrections:
        corrected = found.pop(each.slot, Instruction(each.slot, keep=-1 if each.bracket is None else each.slot))
        new, old = (-1, -1) if each.bracket is None else each.bracket
        compare, change = (-1 if entry is None else entry for entry in (each.compare, each.change))
        # popped and added again, so that it comes after the values that its bracket and its comparison read
        found[each.slot] = corrected._replace(
            new=new, old=old, compare=compare, iteration=each.iteration, change=change
        )
    again = []
    for row, gather in enumerate(update.gathers):
        gathered = found.get(gather.slot, Instruction(gather.slot))
        if gathered.input_row == -1:
            found[gather.slot] = gathered._replace(input_row=row, scale=gather.scale)
        else:  # a second row takes the same state
            again.append(Instruction(gather.slot, input_row=row, scale=gather.scale))
    return [*parts, *found.values(), *again]


def chained(flat: list[Instruction]) -> list[list[Instruction]]:
    """Group instructions into chains, each in the order given."""
    found: dict[int, list[Instruction]] = {}  # chains by the number of their last instruction
    keeping, reading = defaultdict[int, set[int]](set), defaultdict[int, set[int]](set)  # numbers of chains by slot
    for number, instruction in enumerate(flat):
        joined = reading[instruction.keep].union(*(keeping[slot] for slot in instruction.reads()))
        chain = [member for other in sorted(joined) for member in found.pop(other)]
        chain.append(instruction)
        found[number] = chain
        for member in chain:
            for at, slots in ((keeping, {member.keep}), (reading, member.reads())):
                for slot in slots:
                    at[slot] = at[slot] - joined | {number}
    return list(found.values())
