"""The table as instructions for the kernel.

An instruction makes one value, with all that is done to it: a value that is made, corrected and enters the next network
call goes from registers to each of its places, and is never read again. Instructions that read what another one of the
same update has written, or write what it has read, form a chain with it; a chain is walked in order by one program,
chains run side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .update import Update


class Instruction(NamedTuple):
    """One value. -1 stands for nothing to read or write there.

    Attributes:
        state: slot of x.
        row: of the network's output.
        before, draw: slot of x0_prev, entry of the noise.
        new, old: slots of the bracket's terms.
        keep: slot the value is written to.
        enters: row of the next network call.
        compare: slot of the same boundary an iteration before.
        iteration, whole: where the comparison counts, and whether it is the last boundary.
        a .. q: as in `Made`; clip: of the table; scale: of the next network's input.
    """

    state: int
    row: int = -1
    before: int = -1
    draw: int = -1
    new: int = -1
    old: int = -1
    keep: int = -1
    enters: int = -1
    compare: int = -1
    iteration: int = 0
    whole: int = 0
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
        """Slots."""
        return {self.state, self.before, self.new, self.old, self.compare} - {-1}


NUM_WORDS = Instruction._fields.index("a")
NUM_NUMBERS = len(Instruction._fields) - NUM_WORDS


class Chains(NamedTuple):
    """Instructions on the device.

    Attributes:
        words, numbers: [instructions, ...], the integers and the coefficients of each.
        starts: [chains + 1], the first instruction of each chain.
        first: [updates + 1], the first chain of each update.
        wholes: [updates, 2], first and last iteration whose last boundary is compared in an update; 1, 0 for none.
        counts: number of chains of each update, on the host.
        whole_counts: number of iterations whose last boundary is compared in each update, on the host.
    """

    words: Tensor
    numbers: Tensor
    starts: Tensor
    first: Tensor
    wholes: Tensor
    counts: list[int]
    whole_counts: list[int]


def chains(updates: Sequence[Update], dtype: torch.dtype, device: torch.device, clip: float | None) -> Chains:
    """The chains of all updates."""
    of_updates = [chained(instructions(update, clip)) for update in updates]
    flat = [instruction for of_update in of_updates for chain in of_update for instruction in chain]
    lengths = [len(chain) for of_update in of_updates for chain in of_update]
    counts = [len(of_update) for of_update in of_updates]
    compared = [
        [each.iteration for each in update.sums if each.whole and each.compare is not None] for update in updates
    ]

    def integers(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(device)

    return Chains(
        integers([[int(word) for word in instruction[:NUM_WORDS]] for instruction in flat]).reshape(-1, NUM_WORDS),
        torch.tensor([instruction[NUM_WORDS:] for instruction in flat], dtype=torch.float64).to(dtype).to(device),
        integers(_running_sum(lengths)),
        integers(_running_sum(counts)),
        integers([[iterations[0], iterations[-1]] if iterations else [1, 0] for iterations in compared]),
        counts,
        [len(iterations) for iterations in compared],
    )


def instructions(update: Update, clip: float | None = None) -> list[Instruction]:
    """One update, in an order in which every value is written before it is read."""
    found: dict[int, Instruction] = {}
    for value in update.made:
        found[value.keep] = Instruction(
            value.state,
            value.row,
            -1 if value.before is None else value.before,
            -1 if value.draw is None else value.draw,
            keep=value.keep,
            a=value.a,
            b=value.b,
            c=value.c,
            d=value.d,
            s=value.s,
            p=value.p,
            q=value.q,
            clip=math.inf if clip is None else clip,
        )
    for each in update.sums:
        summed = found.pop(each.slot, Instruction(each.slot, keep=-1 if each.bracket is None else each.slot))
        new, old = (-1, -1) if each.bracket is None else each.bracket
        compare = -1 if each.compare is None else each.compare
        # taken out and put back: behind the values that its bracket and comparison read
        found[each.slot] = summed._replace(
            new=new, old=old, compare=compare, iteration=each.iteration, whole=int(each.whole)
        )
    again = []
    for row, entering in enumerate(update.entering):
        given = found.get(entering.slot, Instruction(entering.slot))
        if given.enters == -1:
            found[entering.slot] = given._replace(enters=row, scale=entering.scale)
        else:  # the state enters in two rows
            again.append(Instruction(entering.slot, enters=row, scale=entering.scale))
    return [*found.values(), *again]


def chained(flat: list[Instruction]) -> list[list[Instruction]]:
    """Instructions grouped into chains, each in the order given."""
    found: list[list[Instruction]] = []
    for instruction in flat:
        linked: list[list[Instruction]] = []
        others: list[list[Instruction]] = []
        for chain in found:
            # it reads what another one has written, or writes what that one has read; and one program adds up the
            # change of all iterations that end here
            belongs = any(
                member.keep in instruction.reads()
                or instruction.keep in member.reads()
                or (member.whole and instruction.whole)
                for member in chain
            )
            (linked if belongs else others).append(chain)
        found = [*others, [*(member for chain in linked for member in chain), instruction]]
    return found


def _running_sum(counts: list[int]) -> list[int]:
    total, sums = 0, [0]
    for count in counts:
        total += count
        sums.append(total)
    return sums
