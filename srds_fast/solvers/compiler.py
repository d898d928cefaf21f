"""A program as updates between network calls: what each wave reads and writes, and in which slot of the memory.

A method describes its waves to a `Compiler` in named values, such as ("jump", iteration, block): the steps that make
them and the corrections that change them in place. A slot holds a value until the last wave that reads it, and then
another one. All this is done once per program, so that a wave is one call of `kernels.wave_update`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.wave_update import Correction, Gather, Step, Update, WaveTable
from ..schedulers.steps import ITS_X0, Coefficients, TensorSpec, chained, fine_step, second_order
from ..schedulers.table import NoiseTable
from .contract import SolverInputs
from .program import Program

Name = tuple[str | int, ...]


def x0_of(name: Name) -> Name:
    """Name of the x0 that belongs to a value: the one predicted where its step or jump departs."""
    what, *where = name
    return (f"{what} x0", *where)


class Form(NamedTuple):
    """What the updates of a run depend on, beside its program and its noise table."""

    spec: TensorSpec  # of the states
    history: bool = False  # an x0 to look back at is given with the starting noise
    scaled: bool = False  # the network's input is multiplied with the scheduler's input scale
    constrained: bool = False  # states are constrained after the steps of a wave, before its corrections
    bitwise: bool = False  # compare every boundary with the iteration before, not only the last one

    @classmethod
    def of(cls, x: Tensor, inputs: SolverInputs, bitwise: bool = False) -> Form:
        history, constrained = inputs.x0_prev is not None, inputs.constrain is not None
        return cls(TensorSpec.of(x), history, inputs.scaled, constrained, bitwise)


class Completed(NamedTuple):
    iteration: int
    slot: int
    compared: bool  # with that of the iteration before


@dataclass
class CompiledWave:
    """What a wave leaves in the memory, as (grid position, slot); while it is compiled, numbers of values for slots."""

    # what steps and jumps have made, before corrections: to be constrained
    arrivals: list[tuple[int, int]] = field(default_factory=list)
    # for the trajectory: states after corrections, and the x0 of multistep schedulers
    states: list[tuple[int, int]] = field(default_factory=list)
    x0: list[tuple[int, int]] = field(default_factory=list)
    completed: list[Completed] = field(default_factory=list)  # whole samples


@dataclass(frozen=True)
class CompiledProgram:
    waves: tuple[CompiledWave, ...]
    # the first update brings the starting noise to the network; then one for each wave, two if states are constrained
    table: WaveTable
    # first step, last step + 1, and weights [steps] of the noise that a jump adds up
    jump_noises: list[tuple[int, int, Tensor]]
    history: bool  # slot 1 holds the x0 given with the starting noise

    def noises(self, draws: Tensor | None) -> Tensor | None:
        """The noise of every step, and behind it that of the jumps, [steps + jumps, batch, ...]."""
        if draws is None or not self.jump_noises:
            return draws
        sums = [torch.tensordot(weights, draws[start:stop], dims=1)[None] for start, stop, weights in self.jump_noises]
        return torch.cat([draws, *sums])


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
        self._fine = [fine_step(noise, index) for index in range(noise.num_steps)]
        # a multistep scheduler: an x0 belongs to every state
        self.carries_x0 = any(step.d != 0.0 for step in self._fine)
        self._log_snr: list[float] = (noise.alpha / noise.sigma).log().tolist()
        self._jump_noises: list[tuple[int, int, list[float]]] = []
        self._history = form.history and self.carries_x0
        given = [state, x0_of(state)] if self._history else [state]
        # values are numbered as they are written; first and last wave of each
        self._value = {name: number for number, name in enumerate(given)}
        self._written_in_this_wave: dict[Name, int] = {}
        self._first, self._last = [0] * len(given), [0] * len(given)
        self._waves: list[CompiledWave] = []
        # of the update before the first wave, and of each wave
        self._updates: list[tuple[list[Step], list[Correction], list[Gather]]] = [([], [], [])]

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
        self._positions = self._program.positions[len(self._waves)]
        self.wave = CompiledWave()
        self._waves.append(self.wave)
        self._names, self._states = states, [self._read(name) for name in states]
        scales = self._noise.numbers["input_scale"]
        for state, position in zip(self._states, self._positions, strict=True):
            self._updates[-1][2].append(Gather(state, scales[position] if self._form.scaled else 1.0))
        self._updates.append(([], [], []))

    def make_step(self, row: int, name: Name, jumped_from: int | None = None) -> int:
        """The fine step of a row, which looks back at the x0 of its state if there is one; returns the value.

        jumped_from: a jump from there led to the state. Its x0 stands for that of the step before, between the two.
        """
        position, x0 = self._positions[row], x0_of(self._names[row])
        step = self._fine[position]
        if x0 in self._value and jumped_from is not None:
            here, just_before, far_before = (self._log_snr[each] for each in (position, position - 1, jumped_from))
            way = (here - just_before) / (here - far_before)
            way = way if math.isfinite(way) else 0.0
            step = step._replace(c=step.c + step.d * (1 - way), d=step.d * way)
        noisy = self._noise.spread is not None
        spread = self._noise.numbers["spread"][position] if noisy else 0.0
        value = self._make(row, name, step, x0, position if noisy else None, spread)
        self.wave.arrivals.append((position + 1, value))
        if self.carries_x0:
            self.wave.x0.append((position, self._make(row, x0_of(name), ITS_X0)))
        return value

    def make_jump(
        self, row: int, name: Name, jump: Jump, arrives: int, x0: Name | None = None, *, leads: bool = False
    ) -> None:
        """The jump of a row, looking back at x0, to a grid position. leads: the next jump looks back at its x0."""
        value = self._make(row, name, jump.coefficients, x0, jump.draw, 0.0 if jump.draw is None else 1.0)
        self.wave.arrivals.append((arrives, value))
        if self.carries_x0 or leads:
            self._make(row, x0_of(name), ITS_X0)

    def correct(
        self,
        name: Name,
        bracket: tuple[Name, Name] | None,
        compare: Name | None = None,
        iteration: int = 0,
        whole: bool = False,
        becomes: Sequence[Name] = (),
    ) -> Completed:
        """A `Correction` of a value, and of its x0. becomes: names that the value has from now on."""
        self._value |= self._written_in_this_wave  # from here on, reads find what the steps of this wave have written
        value, before = self._read(name), self._read_if_there(compare)
        pair = None if bracket is None else (self._read(bracket[0]), self._read(bracket[1]))
        if pair is not None or before is not None:
            self._updates[-1][1].append(Correction(value, pair, before, iteration, whole))
        self._value |= dict.fromkeys(becomes, value)
        if self.carries_x0:
            x0 = self._read(x0_of(name))
            if bracket is not None:
                new, old = (self._read(x0_of(each)) for each in bracket)
                self._updates[-1][1].append(Correction(x0, (new, old)))
            self._value |= {x0_of(each): x0 for each in becomes}
        return Completed(iteration, value, before is not None)

    def finish(self) -> CompiledProgram:
        """The table, with a slot for every value."""
        slots, num_slots = self._slots()

        def at(value: int | None) -> int | None:
            return None if value is None else slots[value]

        updates: list[Update] = []
        for steps, corrections, gathers in self._updates:
            update = Update(
                tuple(v._replace(keep=slots[v.keep], state=slots[v.state], before=at(v.before)) for v in steps),
                tuple(
                    v._replace(
                        slot=slots[v.slot],
                        bracket=v.bracket and (slots[v.bracket[0]], slots[v.bracket[1]]),
                        compare=at(v.compare),
                    )
                    for v in corrections
                ),
                tuple(v._replace(slot=slots[v.slot]) for v in gathers),
            )
            if self._form.constrained and updates:
                updates += [Update(update.steps), update._replace(steps=())]
            else:
                updates.append(update)
        for wave in self._waves:
            for values in (wave.arrivals, wave.states, wave.x0):
                values[:] = [(position, slots[value]) for position, value in values]
            wave.completed[:] = [each._replace(slot=slots[each.slot]) for each in wave.completed]
        dtype, device, ndim = self._form.spec
        num_iterations, clip = self._program.num_iterations, self._noise.clip
        table = WaveTable(updates, num_slots, num_iterations, dtype, device, ndim, clip, self._form.bitwise)
        jump_noises = [
            (start, stop, torch.tensor(weights, dtype=dtype, device=device))
            for start, stop, weights in self._jump_noises
        ]
        return CompiledProgram(tuple(self._waves), table, jump_noises, self._history)

    def _make(
        self, row: int, name: Name, step: Coefficients, x0: Name | None = None, draw: int | None = None, s: float = 0.0
    ) -> int:
        noise, position = self._noise, self._positions[row]
        before = self._read_if_there(x0)
        a, b, c, d = step
        if before is None:
            c, d = c + d, 0.0
        p, q = noise.numbers["p"][position], noise.numbers["q"][position]
        if noise.clip is None and c != 0.0:  # x0 is linear in x and m: fewer products in each wave
            a, b, c = a + c * p, b + c * q, 0.0
        if c == 0.0:
            p = q = 0.0
        value, number = len(self._first), len(self._waves) - 1
        self._first.append(number)
        self._last.append(number)
        self._written_in_this_wave[name] = value
        self._updates[-1][0].append(Step(value, self._states[row], row, a, b, c, d, p, q, before, draw, s))
        return value

    def _read(self, name: Name) -> int:
        value = self._value[name]
        self._last[value] = len(self._waves) - 1
        return value

    def _read_if_there(self, name: Name | None) -> int | None:
        return None if name is None or name not in self._value else self._read(name)

    def _slots(self) -> tuple[list[int], int]:
        slots, free, num_slots = list[int](), list[int](), 0
        ends = sorted(range(len(self._last)), key=self._last.__getitem__, reverse=True)
        for first in self._first:
            while self._last[ends[-1]] < first:
                free.append(slots[ends.pop()])
            if not free:
                free.append(num_slots)
                num_slots += 1
            slots.append(free.pop())
        return slots, num_slots
