"""What each wave of an SRDS program reads and writes, and in which slot of the memory. Pure Python, no tensors.

Worked out once per program, so that a wave is a handful of batched operations however many rows it has.

Values have names (what, iteration, block). "state" is where the solve of a block stands, at first the boundary it
starts from; "solved" is where it ends; "jump" is where the coarse jump across the block lands; "lead" is what the x0
here adds to a 2M jump across the next block. Multistep fine solvers carry an x0 along with the state: "behind" is the
one the next fine step looks back at, "solved x0" and "jump x0" correct it at the boundaries as "solved" and "jump" do
the state.

A slot holds a value until the last wave that reads it, and then another one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ..program import Boundary, Program, Row, Wave, settled

Name = tuple[str, int, int]


class Output(NamedTuple):
    """One row of what a wave computes.

    Attributes:
        kind: which coefficients make it: "jump", "fine", "lead" or "x0".
        source: number of the row in the wave, whose state and network output it is made from.
        row: that row.
        arrives: the grid position a jump or fine step arrives at.
        slot: where it is kept.
    """

    kind: str
    source: int
    row: Row
    arrives: int
    slot: int


class Sum(NamedTuple):
    """F(x^{p-1}) + ( G(x^p) - G(x^{p-1}) ), the value at a boundary.

    Attributes:
        slot: of F, to which the bracket is added, or of G, which alone makes the coarse sweep.
        bracket: slots of the two G; None where nothing is added: in the coarse sweep and in the exact prefix.
    """

    slot: int
    bracket: tuple[int, int] | None


class Birth(NamedTuple):
    """A boundary that comes into being, and the x0 that belongs to it."""

    boundary: Boundary
    state: Sum
    x0: Sum | None


class Exchange(NamedTuple):
    """Reads and writes of one wave.

    Attributes:
        outputs: the jumps, the fine steps, the leads, the x0 of the jumps, the x0 of the fine steps. The network's rows
            come first and in their order, each by the first of its outputs.
        states: slots of the states the outputs are made from.
        solves, steps: which outputs are fine steps, and these.
        leads: slots of a jump and of the lead that is added to it.
        behind: for each fine step the slot of the x0 it looks back at; None at the start of the grid.
        births: the boundaries that come into being.
    """

    outputs: tuple[Output, ...]
    states: tuple[int, ...]
    solves: slice
    steps: tuple[Output, ...]
    leads: tuple[tuple[int, int], ...]
    behind: tuple[int | None, ...]
    births: tuple[Birth, ...]


class Layout(NamedTuple):
    """The exchanges of all waves, and how many slots they need. The starting noise is in slot 0."""

    waves: tuple[Exchange, ...]
    num_slots: int


@lru_cache(maxsize=64)
def exchanges(program: Program, led: tuple[int, ...], carries_x0: bool) -> Layout:
    """The exchanges of a program, wave by wave.

    Args:
        program: `program.srds(...)`.
        led: blocks whose jump takes a lead from the boundary before.
        carries_x0: an x0 belongs to the state.
    """
    values = _Values()
    waves = [_exchange(number, wave, program, led, carries_x0, values) for number, wave in enumerate(program)]
    slots, num_slots = values.slots()
    return Layout(tuple(_in_slots(exchange, slots) for exchange in waves), num_slots)


class _Values:
    """The values of a program, numbered as they come into being, and the waves that write and last read each."""

    def __init__(self) -> None:
        self._newest: dict[Name, int] = {("state", 0, 0): 0}
        self._written = [0]
        self._read = [0]

    def write(self, wave: int, name: Name) -> int:
        self._newest[name] = len(self._written)
        self._written.append(wave)
        self._read.append(wave)
        return self._newest[name]

    def read(self, wave: int, name: Name) -> int:
        value = self._newest[name]
        self._read[value] = wave
        return value

    def rename(self, value: int, name: Name) -> None:
        self._newest[name] = value

    def slots(self) -> tuple[list[int], int]:
        """A slot for each value, and how many there are."""
        slots: list[int] = []
        free: list[int] = []
        num_slots = 0
        ends = sorted(range(len(self._read)), key=self._read.__getitem__, reverse=True)
        for written in self._written:
            while self._read[ends[-1]] < written:
                free.append(slots[ends.pop()])
            if not free:
                free.append(num_slots)
                num_slots += 1
            slots.append(free.pop())
        return slots, num_slots


def _exchange(
    number: int, wave: Wave, program: Program, led: tuple[int, ...], carries_x0: bool, values: _Values
) -> Exchange:
    """The exchange of a wave, with values in place of slots."""
    bounds = program.bounds
    jumps = [(source, row) for source, row in enumerate(wave.rows) if row.coarse]
    solves = [(source, row) for source, row in enumerate(wave.rows) if row.fine]
    # rows are jumps, both, or fine steps; those that are both have had their turn as jumps
    solves.sort(key=lambda each: each[1].coarse)
    states = {row: values.read(number, ("state", row.iteration, row.block)) for row in wave.rows}
    behind = [
        values.read(number, ("behind", row.iteration, row.block)) if carries_x0 and row.position > 0 else None
        for _, row in solves
    ]
    outputs = []

    def write(kind: str, what: str, source: int, row: Row, arrives: int = 0) -> None:
        value = values.write(number, (what, row.iteration, row.block))
        outputs.append(Output(kind, source, row, arrives, value))

    for source, row in jumps:
        write("jump", "jump", source, row, bounds[row.block + 1])
    for source, row in solves:
        write("fine", "solved" if _is_last(row, program) else "state", source, row, row.position + 1)
    for source, row in jumps:
        if row.block + 1 in led:
            write("lead", "lead", source, row)
    if carries_x0:
        for source, row in jumps:
            write("x0", "jump x0", source, row)
        for source, row in solves:
            write("x0", "solved x0" if _is_last(row, program) else "behind", source, row)

    leads = [
        (output.slot, values.read(number, ("lead", *settled(output.row.iteration, output.row.block - 1))))
        for output in outputs
        if output.kind == "jump" and output.row.block in led
    ]
    births = []
    for boundary in wave.boundaries:
        state = _sum(number, boundary, "state", "solved", "jump", values)
        x0 = _sum(number, boundary, "behind", "solved x0", "jump x0", values) if carries_x0 else None
        births.append(Birth(boundary, state, x0))
    fine = slice(len(jumps), len(jumps) + len(solves))
    return Exchange(
        tuple(outputs),
        tuple(states[output.row] for output in outputs),
        fine,
        tuple(outputs[fine]),
        tuple(leads),
        tuple(behind),
        tuple(births),
    )


def _is_last(row: Row, program: Program) -> bool:
    return row.position + 1 == program.bounds[row.block + 1]


def _sum(number: int, boundary: Boundary, what: str, solved: str, jump: str, values: _Values) -> Sum:
    iteration, block = boundary.iteration, boundary.boundary - 1
    bracket = None
    if iteration == 0:
        value = values.read(number, (jump, 0, block))
    else:
        value = values.read(number, (solved, iteration - 1, block))
        if iteration <= block:
            new, before = (values.read(number, (jump, each, block)) for each in (iteration, iteration - 1))
            bracket = new, before
    values.rename(value, (what, *boundary))
    return Sum(value, bracket)


def _in_slots(exchange: Exchange, slots: list[int]) -> Exchange:
    def placed(value: Sum) -> Sum:
        if value.bracket is None:
            return Sum(slots[value.slot], None)
        new, before = value.bracket
        return Sum(slots[value.slot], (slots[new], slots[before]))

    outputs = tuple(output._replace(slot=slots[output.slot]) for output in exchange.outputs)
    return exchange._replace(
        outputs=outputs,
        steps=outputs[exchange.solves],
        states=tuple(slots[value] for value in exchange.states),
        leads=tuple((slots[jump], slots[lead]) for jump, lead in exchange.leads),
        behind=tuple(None if value is None else slots[value] for value in exchange.behind),
        births=tuple(
            Birth(birth.boundary, placed(birth.state), None if birth.x0 is None else placed(birth.x0))
            for birth in exchange.births
        ),
    )
