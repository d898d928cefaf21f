"""The bytes that an update moves, counted from its table."""

from __future__ import annotations

from typing import NamedTuple

from .instructions import instructions
from .table import WaveTable


class Traffic(NamedTuple):
    """Bytes per element of a state."""

    moved: int  # by the kernel: every load and store, including those that a cache answers
    fewest: int  # possible: what the update does not make itself is read once, each result is written once


def traffic(table: WaveTable, number: int, network_bytes: int, branches: int = 1, inputs: int = 1) -> Traffic:
    """The bytes that an update moves; branches of the output and copies of the input have elements of network_bytes."""
    update, state_bytes = table.updates[number], table.dtype.itemsize
    moved = 0
    reads, written = set[int](), set[int]()
    for each in instructions(update):
        loads = sum(slot >= 0 for slot in (each.state, each.before, each.new, each.old, each.compare))
        moved += state_bytes * (loads + (each.draw >= 0) + (each.keep >= 0))
        moved += network_bytes * ((each.row >= 0) * branches + (each.input_row >= 0) * inputs)
        reads |= each.reads() - written
        written |= {each.keep} - {-1}
    rows = {step.row for step in update.steps}
    draws = {step.draw for step in update.steps} - {None}
    fewest = state_bytes * (len(reads) + len(draws) + len(written))
    fewest += network_bytes * (len(rows) * branches + len(update.gathers) * inputs)
    return Traffic(moved, fewest)
