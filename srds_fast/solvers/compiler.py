"""A program as updates between network calls: what each wave reads and writes, and in which slot of the memory.

A method describes its waves to a `Compiler` in named values, such as ("jump", iteration, block): the steps that make
them and the corrections that change them in place. A slot holds a value until the last wave that reads it, and then
another one. All this is done once per program, so that a wave is one call of `kernels.wave_update`. A long program is
compiled in stages, each when a run comes to it, see `Compiler.cut`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from ..kernels.common.by_field import ByField
from ..kernels.wave_update import Correction, Gather, Step, Update, WaveTable
from ..schedulers.steps import (
    ITS_X0,
    Coefficients,
    Guess,
    Vector,
    chained,
    guessed_history,
    made_by_step,
    second_order,
)
from ..schedulers.table import NoiseTable
from .compiled import CompiledProgram, CompiledWave, Completed, Form
from .program import Program

Name = tuple[str | int, ...]
_OpenStep = tuple[int, int, int, tuple[float, ...], tuple[tuple[int, float], ...], int | None]
"""Value, value of its state, row, what `Compiler._fold` gives, values that it looks back at, draw."""
_Open = tuple[list[_OpenStep], list[Correction], list[int], list[float]]
"""An update that is collected, values and scales of its gathers last. An `Update` with slots is made of it once."""


def x0_of(name: Name) -> Name:
    """Name of the x0 that belongs to a value: the one predicted where its step or jump departs."""
    what, *where = name
    return (f"{what} x0", *where)


def carried_by(name: Name, count: int) -> list[Name]:
    """Names of the vectors that a scheduler with `NoiseTable.memory` carries beside a value."""
    what, *where = name
    return [(f"{what} carries {number}", *where) for number in range(count)]


class Jump(NamedTuple):
    coefficients: Coefficients
    draw: int | None = None  # entry of the noise that it adds


class Compiler:
    """Collects the waves of a program, in order.

    Within a wave come first its steps, each of which reads what earlier waves wrote, then its corrections, which also
    read what these steps have written. `wave` is the one being compiled.
    """

    def __init__(self, noise: NoiseTable, program: Program, form: Form, state: Name) -> None:
        self._noise, self._program, self._form = noise, program, form
        self._fine = [made_by_step(noise, index) for index in range(noise.num_steps)]
        # a multistep scheduler: an x0, or what is carried, belongs to every state
        self.carries = noise.memory is not None or any(any(step[0].d) for step in self._fine)
        self._guesses: dict[tuple[int, int | None], list[Guess]] = {}
        # of the steps from each position, where they carry nothing
        self._folded: dict[int, tuple[float, ...]] = {}
        self._draws = noise.spread is not None
        self._jump_noises: list[tuple[int, int, list[float]]] = []
        given = [state]
        if form.history and self.carries:
            given += self._carried(state, len(self._fine[0][0].d))
        self._history = len(given) - 1
        # how many vectors are carried beside a value
        self._counts: dict[Name, int] = {state: self._history}
        self._num_changes = 0
        # values are numbered as they are written; first and last wave of each
        self._value = {name: number for number, name in enumerate(given)}
        self._written_in_this_wave: dict[Name, int] = {}
        self._first, self._last = [0] * len(given), [0] * len(given)
        self._number = -1  # of the wave that is compiled
        # of values that stages before have written and later ones may read; slots that are free at the end of a stage
        self._slot_of: dict[int, int] = {}
        self._free, self._num_slots, self._num_written = list[int](), 0, 0
        self._waves: list[CompiledWave] = []  # of the stage
        # of the update before the first wave of the stage, and of each wave
        self._updates: list[_Open] = [([], [], [], [])]

    def jump(self, previous: int | None, start: int, stop: int, *, noisy: bool = True) -> Jump:
        """A jump from `start` to `stop`, looking back at the x0 at `previous`; noisy: with the noise of its steps."""
        noise = self._noise
        if noise.momentum is None and noise.spread is None:
            return Jump(second_order(noise, previous, start, stop))
        coefficients, weights = chained(noise, previous, start, stop)
        if noise.spread is None or not noisy:
            return Jump(coefficients)
        self._jump_noises.append((start, stop, weights))
        return Jump(coefficients, noise.num_steps + len(self._jump_noises) - 1)

    def begin(self, states: Sequence[Name]) -> None:
        """Begin the next wave. states: those that the network is evaluated at, row by row."""
        self._value |= self._written_in_this_wave
        self._written_in_this_wave = {}
        self._number += 1
        self._positions = self._program.positions[self._number]
        self.wave = CompiledWave()
        self._waves.append(self.wave)
        self._names, self._states = states, [self._read(name) for name in states]
        scales = self._noise.numbers["input_scale"] if self._form.scaled else None
        *_, gathered, factors = self._updates[-1]
        gathered += self._states
        factors += [1.0 if scales is None else scales[position] for position in self._positions]
        self._updates.append(([], [], [], []))

    def make_step(self, row: int, name: Name, jumped_from: int | None = None, *, own_from: int = 0) -> int:
        """The fine step of a row, and what it carries; it looks back at what its state carries. Returns the value.

        jumped_from: a jump from there led to the state. What earlier steps would have left is guessed: x0 goes along a
        line from that of the jump to that of the state. own_from: what is carried on unchanged is copied if it was
        there before the value of this number, see `num_values`.
        """
        position, state = self._positions[row], self._names[row]
        if not self.carries:  # the step reads its state alone
            folded = self._folded.get(position)
            if folded is None:
                folded = self._folded[position] = self._fold(position, self._fine[position][0])
            value = self._write(row, name, folded, (), position if self._draws else None)
            self._arrives(position + 1, value)
            return value
        made = self._fine[position]
        before = self._carried(state, len(made[0].d))
        if jumped_from is not None or not all(each in self._value for each in before):
            before = []
        targets, found = [name, *self._carried(name, len(made) - 1)], list[int]()
        for target, vector in zip(targets, made, strict=True):
            carried_on = vector.carries_on if before else None
            # of the state also where a step adds none of what it draws
            draw = position if self._noise.spread is not None and (target is name or vector.s != 0.0) else None
            if carried_on is not None:
                value = self._carry_on(row, before[carried_on], own_from)
            elif before:
                looks_back = [(each, weight) for each, weight in zip(before, vector.d, strict=True) if weight != 0.0]
                value = self._make(row, target, vector, looks_back, draw)
            else:
                value = self._make_alone(row, target, vector, state, jumped_from, draw)
            found.append(value)
        self._note(name, found[1:])
        self._arrives(position + 1, found[0])
        self.wave.carried.append((position + 1, found[1:]))
        return found[0]

    def make_jump(
        self, row: int, name: Name, jump: Jump, arrives: int, x0: Name | None = None, *, leads: bool = False
    ) -> None:
        """The jump of a row, looking back at x0, to a grid position. leads: the next jump looks back at its x0."""
        a, b, c, d = jump.coefficients
        looks_back = [] if x0 is None or x0 not in self._value else [(x0, d)]
        vector = Vector(a, b, c if looks_back else c + d, (), 0.0 if jump.draw is None else 1.0)
        value = self._make(row, name, vector, looks_back, jump.draw)
        self._arrives(arrives, value)
        clean = [self._make(row, x0_of(name), ITS_X0)] if self.carries or leads else []
        if self._noise.memory is None:
            self._note(name, clean)
        else:
            self._note(name, self._history_of(row, name, vector, looks_back, jump.draw, arrives))

    def _arrives(self, position: int, value: int) -> None:
        if self._form.constrained:
            self.wave.arrivals.append((position, value))

    def _history_of(
        self, row: int, name: Name, jump: Vector, looks_back: list[tuple[Name, float]], draw: int | None, arrives: int
    ) -> list[int]:
        """What a jump carries: as if its x0, and the eps with which it arrives where it does, had been so before."""
        guesses, found = self._guess(arrives, None), list[int]()
        alpha, sigma = self._level(arrives)
        for target, guess in zip(self._carried(name, len(guesses)), guesses, strict=True):
            share = guess.eps / sigma
            c = guess.x0 + share * (jump.c - alpha)
            scaled = [(each, share * weight) for each, weight in looks_back] if share else []
            vector = Vector(share * jump.a, share * jump.b, c, (), share * jump.s)
            found.append(self._make(row, target, vector, scaled, draw if share else None))
        return found

    def correct(
        self,
        name: Name,
        bracket: tuple[Name, Name] | None,
        compare: Name | None = None,
        iteration: int = 0,
        measured: bool = False,
        becomes: Sequence[Name] = (),
    ) -> Completed:
        """A `Correction` of a value, and of all that it carries.

        measured: by how much it differs from `compare`. becomes: names that the value has from now on.
        """
        self._value |= self._written_in_this_wave  # from here on, reads find what the steps of this wave have written
        value, before = self._read(name), self._read_if_there(compare)
        pair = None if bracket is None else (self._read(bracket[0]), self._read(bracket[1]))
        change = None
        if measured and before is not None:
            change = self._num_changes
            self._num_changes += 1
        if pair is not None or before is not None:
            self._updates[-1][1].append(Correction(value, pair, before, iteration, change))
        self._value |= dict.fromkeys(becomes, value)
        if self.carries:
            count = self._counts[name]
            vectors = [self._read(each) for each in self._carried(name, count)]
            if bracket is not None:
                pairs = zip(*(map(self._read, self._carried(of, count)) for of in bracket), strict=True)
                # the newest first: the steps of this wave that make them may read the older ones as they are
                newest_first = sorted(zip(vectors, pairs, strict=True), reverse=True)
                self._updates[-1][1].extend(Correction(vector, of_jumps) for vector, of_jumps in newest_first)
            for other in becomes:
                self._counts[other] = count
                self._value |= dict(zip(self._carried(other, count), vectors, strict=True))
                if x0_of(name) in self._value:  # of a jump
                    self._value[x0_of(other)] = self._value[x0_of(name)]
        return Completed(iteration, value, change)

    @property
    def num_values(self) -> int:
        """Values made so far. They are numbered as they are made."""
        return len(self._first)

    def forget(self, names: Iterable[Name]) -> None:
        """No later wave reads the values of these names, nor what is carried beside them."""
        for name in names:
            for each in (name, x0_of(name), *self._carried(name, self._counts.pop(name, 0))):
                self._value.pop(each, None)

    def cut(self) -> CompiledProgram:
        """The waves before the one that has just begun, as a stage: values that still have a name keep their slots."""
        *waves, self.wave = self._waves
        *updates, opened = self._updates
        found = self._stage(waves, updates, set(self._value.values()))
        # the first wave of a stage is brought to the network by the last update of the stage before
        self._waves, self._updates = [self.wave], [([], [], [], []), opened]
        return found

    def finish(self) -> CompiledProgram:
        """The waves that are left, all if none was cut off."""
        return self._stage(self._waves, self._updates, set())

    def _stage(self, waves: list[CompiledWave], raw: list[_Open], alive: set[int]) -> CompiledProgram:
        """The table, with a slot for every value. alive: values that later stages may read."""
        slots, num_slots = self._slots(alive)

        def of_all(values: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
            return tuple([(slots[value], weight) for value, weight in values]) if values else ()

        slot_of, updates = slots.__getitem__, list[Update]()
        for steps, corrections, gathered, scales in raw:
            made: Sequence[Step] = ()
            if steps:
                kept, states, rows, folded, before, draws = zip(*steps, strict=True)
                *numbers, s = zip(*folded, strict=True)
                slots_of = map(slot_of, kept), map(slot_of, states)
                made = ByField(Step, (*slots_of, rows, *numbers, map(of_all, before), draws, s))
            update = Update(
                made,
                tuple(
                    [
                        Correction(
                            slots[slot],
                            bracket and (slots[bracket[0]], slots[bracket[1]]),
                            None if compare is None else slots[compare],
                            iteration,
                            change,
                        )
                        for slot, bracket, compare, iteration, change in corrections
                    ]
                ),
                ByField(Gather, (map(slot_of, gathered), scales)),
            )
            if self._form.constrained and updates:
                updates += [Update(update.steps), update._replace(steps=())]
            else:
                updates.append(update)
        for wave in waves:
            for values in (wave.arrivals, wave.states):
                values[:] = [(position, slots[value]) for position, value in values]
            wave.carried[:] = [(position, [slots[each] for each in values]) for position, values in wave.carried]
            wave.completed[:] = [each._replace(slot=slots[each.slot]) for each in wave.completed]
        dtype, device, ndim = self._form.spec
        num_iterations, clip = self._program.num_iterations, self._noise.clip
        table = WaveTable(updates, num_slots, num_iterations, dtype, device, ndim, clip, self._form.bitwise)
        jump_noises = [
            (start, stop, torch.tensor(weights, dtype=dtype, device=device))
            for start, stop, weights in self._jump_noises
        ]
        return CompiledProgram(tuple(waves), table, jump_noises, self._history)

    def _carried(self, name: Name, count: int) -> list[Name]:
        if not count:
            return []
        return carried_by(name, count) if self._noise.memory is not None else [x0_of(name)][:count]

    def _note(self, name: Name, carried: Sequence[int]) -> None:
        """Give the vectors that are carried beside a value their names."""
        self._counts[name] = len(carried)
        self._written_in_this_wave |= dict(zip(self._carried(name, len(carried)), carried, strict=True))

    def _carry_on(self, row: int, name: Name, own_from: int) -> int:
        """A vector that is carried on unchanged."""
        value = self._read(name)
        if value >= own_from:
            return value
        return self._make(row, None, Vector(0.0, 0.0, 0.0), [(name, 1.0)])

    def _make_alone(
        self, row: int, name: Name, vector: Vector, state: Name, jumped_from: int | None, draw: int | None
    ) -> int:
        """A vector of a step to whose state nothing is carried: that is guessed from its own x0 and eps."""
        position, x0 = self._positions[row], x0_of(state)
        drifts = jumped_from is not None and x0 in self._value
        guesses = self._guess(position, jumped_from if drifts else None) if vector.d else []
        if len(guesses) < len(vector.d):  # at the beginning of the grid: the step's own x0
            guesses = [Guess(1.0, 0.0, 0.0)]
        a, b, c, _, s = vector
        r, to_m, drift = self._noise.numbers["r"][position], self._noise.numbers["s"][position], 0.0
        for weight, guess in zip(vector.d, guesses, strict=True):
            share = guess.drift if drifts else 0.0
            a, b, c = a + weight * guess.eps * r, b + weight * guess.eps * to_m, c + weight * (guess.x0 - share)
            drift += weight * share
        return self._make(row, name, Vector(a, b, c, (), s), [(x0, drift)] if drift != 0.0 else [], draw)

    def _guess(self, cut: int, far: int | None) -> list[Guess]:
        if (cut, far) not in self._guesses:
            self._guesses[cut, far] = guessed_history(self._noise, cut, far)
        return self._guesses[cut, far]

    def _level(self, position: int) -> tuple[float, float]:
        column, last = self._noise.numbers, position == self._noise.num_steps
        if last:
            return column["alpha_next"][-1], column["sigma_next"][-1]
        return column["alpha"][position], column["sigma"][position]

    def _make(
        self,
        row: int,
        name: Name | None,
        vector: Vector,
        looks_back: Sequence[tuple[Name, float]] = (),
        draw: int | None = None,
    ) -> int:
        """A new value of this name, or of none. looks_back: in the place of `vector.d`, by name."""
        before = tuple((self._read(each), weight) for each, weight in looks_back)
        return self._write(row, name, self._fold(self._positions[row], vector), before, draw)

    def _fold(self, position: int, vector: Vector) -> tuple[float, ...]:
        """a, b, c, p, q and s of a `Step` that departs from a position."""
        a, b, c, _, s = vector
        p, q = self._noise.numbers["p"][position], self._noise.numbers["q"][position]
        if self._noise.clip is None and c != 0.0:  # x0 is linear in x and m: fewer products in each wave
            a, b, c = a + c * p, b + c * q, 0.0
        if c == 0.0:
            p = q = 0.0
        return a, b, c, p, q, s

    def _write(
        self,
        row: int,
        name: Name | None,
        folded: tuple[float, ...],
        before: tuple[tuple[int, float], ...],
        draw: int | None,
    ) -> int:
        value, number = len(self._first), self._number
        self._first.append(number)
        self._last.append(number)
        if name is not None:
            self._written_in_this_wave[name] = value
        self._updates[-1][0].append((value, self._states[row], row, folded, before, draw))
        return value

    def _read(self, name: Name) -> int:
        value = self._value[name]
        self._last[value] = self._number
        return value

    def _read_if_there(self, name: Name | None) -> int | None:
        return None if name is None or name not in self._value else self._read(name)

    def _slots(self, alive: set[int]) -> tuple[dict[int, int], int]:
        """A slot for every value that the stage writes or reads; those that are alive keep theirs at its end."""
        slots, free, never = self._slot_of, self._free, self._number + 1
        written = range(self._num_written, len(self._first))
        last = {value: never if value in alive else self._last[value] for value in (*slots, *written)}
        ends = sorted(last, key=last.__getitem__, reverse=True)
        for value in written:
            while last[ends[-1]] < self._first[value]:
                free.append(slots[ends.pop()])
            if not free:
                free.append(self._num_slots)
                self._num_slots += 1
            slots[value] = free.pop()
        free += [slots[value] for value in ends if value not in alive]
        self._slot_of = {value: slots[value] for value in alive}
        self._num_written = len(self._first)
        return slots, self._num_slots
