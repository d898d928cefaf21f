"""What each wave of an SRDS program reads and writes, and in which slot of the memory. Pure Python, no tensors.

Worked out once per program, so that a wave is a handful of batched operations however many rows it has.

Values have names (what, iteration, block). "state" is where the solve of a block stands, at first the boundary it
starts from; "solved" is where it ends; "jump" is where the coarse jump across the block lands; "lead" is the x0 here,
for the 2M jump across the next block to look back at. Multistep fine solvers carry an x0 along with the state: "behind"
is the one the next fine step looks back at, "solved x0" and "jump x0" correct it at the boundaries as "solved" and
"jump" do the state; "jump x0" is the lead then. "completed" is a boundary, whatever its solve has come to since.

A slot holds a value until the last wave that reads it, and then another one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .program import Boundary, Program, Row, Wave, settled

Name = tuple[str, int, int]


class Output(NamedTuple):
    """A value that a wave computes.

    Attributes:
        kind: which coefficients make it: "jump", "fine", "lead" (the x0 of a jump) or "x0" (that of a fine step).
        source: number of the row in the wave, whose network output it is made from.
        row: that row.
        arrives: the grid position a jump or fine step arrives at.
        state: slot of the row's state.
        before: slot of the x0 that it looks back at; None: at nothing.
        slot: where it is kept.
    """

    kind: str
    source: int
    row: Row
    arrives: int
    state: int
    before: int | None
    slot: int


class Sum(NamedTuple):
    """F(x^{p-1}) + ( G(x^p) - G(x^{p-1}) ), the value at a boundary.

    Attributes:
        slot: of F, to which the bracket is added, or of G, which alone makes the coarse sweep.
        bracket: slots of the two G; None where nothing is added: in the coarse sweep and in the exact prefix.
    """

    slot: int
    bracket: tuple[int, int] | None


class Completed(NamedTuple):
    """A boundary that comes into being, and the x0 that belongs to it.

    Attributes:
        compare: slot of the boundary as the iteration before left it; None where nobody asks how far it moved.
    """

    boundary: Boundary
    state: Sum
    x0: Sum | None
    compare: int | None


class Exchange(NamedTuple):
    """Reads and writes of one wave.

    Attributes:
        states: slots of the states that the network is evaluated at, row by row.
        outputs: the jumps, the fine steps, the leads, the x0.
        completions: the boundaries that come into being.
    """

    states: tuple[int, ...]
    outputs: tuple[Output, ...]
    completions: tuple[Completed, ...]


class Layout(NamedTuple):
    """The exchanges of all waves, and how many slots they need.

    The starting noise is in slot 0; the x0 that the first step looks back at, if it was given, in slot 1.
    """

    waves: tuple[Exchange, ...]
    num_slots: int


@lru_cache(maxsize=64)
def exchanges(
    program: Program, led: tuple[int, ...] = (), carries_x0: bool = False, x0_given: bool = False, watched: bool = False
) -> Layout:
    """The exchanges of a program, wave by wave.

    Args:
        program: `program.srds(...)` or `program.sequential(...)`.
        led: blocks whose jump looks back at the x0 of the boundary before.
        carries_x0: an x0 belongs to the state.
        x0_given: also at the start.
        watched: compare every boundary with the iteration before, not only the last one.
    """
    values = _Values(["state", "behind"] if x0_given else ["state"])
    waves = [_exchange(number, wave, program, led, carries_x0, watched, values) for number, wave in enumerate(program)]
    slots, num_slots = values.slots()
    return Layout(tuple(_in_slots(exchange, slots) for exchange in waves), num_slots)


class _Values:
    """The values of a program, numbered as they come into being, and the waves that write and last read each."""

    def __init__(self, given: list[str]) -> None:
        self._newest: dict[Name, int] = {(what, 0, 0): value for value, what in enumerate(given)}
        self._written = [0] * len(given)
        self._read = [0] * len(given)

    def __contains__(self, name: Name) -> bool:
        return name in self._newest

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
    number: int,
    wave: Wave,
    program: Program,
    led: tuple[int, ...],
    carries_x0: bool,
    watched: bool,
    values: _Values,
) -> Exchange:
    """The exchange of a wave, with values in place of slots."""
    bounds = program.bounds
    lead = "jump x0" if carries_x0 else "lead"
    jumps = [(source, row) for source, row in enumerate(wave.rows) if row.coarse]
    solves = [(source, row) for source, row in enumerate(wave.rows) if row.fine]
    states = [values.read(number, ("state", row.iteration, row.block)) for row in wave.rows]
    # all that is read, before anything is written under a name that it may have
    look_back = {}
    for _, row in jumps:
        if row.block in led:
            look_back["jump", row] = values.read(number, (lead, *settled(row.iteration, row.block - 1)))
    for _, row in solves:
        behind = ("behind", row.iteration, row.block)
        if carries_x0 and behind in values:
            look_back["fine", row] = values.read(number, behind)
    outputs = []

    def write(kind: str, what: str, source: int, row: Row, arrives: int = 0) -> None:
        value = values.write(number, (what, row.iteration, row.block))
        outputs.append(Output(kind, source, row, arrives, states[source], look_back.get((kind, row)), value))

    for source, row in jumps:
        write("jump", "jump", source, row, bounds[row.block + 1])
    for source, row in solves:
        write("fine", "solved" if _is_last(row, program) else "state", source, row, row.position + 1)
    for source, row in jumps:
        if carries_x0 or row.block + 1 in led:
            write("lead", lead, source, row)
    if carries_x0:
        for source, row in solves:
            write("x0", "solved x0" if _is_last(row, program) else "behind", source, row)

    completions = []
    for boundary in wave.boundaries:
        state = _sum(number, boundary, "state", "solved", "jump", values)
        x0 = _sum(number, boundary, "behind", "solved x0", "jump x0", values) if carries_x0 else None
        values.rename(state.slot, ("completed", *boundary))
        before = ("completed", boundary.iteration - 1, boundary.boundary)
        compared = (watched or boundary.boundary == program.num_blocks) and before in values
        completions.append(Completed(boundary, state, x0, values.read(number, before) if compared else None))
    return Exchange(tuple(states), tuple(outputs), tuple(completions))


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

    def there(value: int | None) -> int | None:
        return None if value is None else slots[value]

    return Exchange(
        tuple(slots[value] for value in exchange.states),
        tuple(
            output._replace(state=slots[output.state], before=there(output.before), slot=slots[output.slot])
            for output in exchange.outputs
        ),
        tuple(
            Completed(boundary, placed(state), None if x0 is None else placed(x0), there(compare))
            for boundary, state, x0, compare in exchange.completions
        ),
    )
