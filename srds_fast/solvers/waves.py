"""The waves of methods whose network calls are fixed in advance: sequential, SRDS and CHORDS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.wave_update import Buffers, wave_update
from .compiled import CompiledProgram, Completed
from .contract import Answer, Checkpoint, Core, Evaluate, SolverInputs, output_of, samples_of
from .program import Program


class Waves:
    """The memory of one run, of the `samples` of the original batch that still run."""

    def __init__(self, x: Tensor, program: Program, compiled: CompiledProgram, inputs: SolverInputs) -> None:
        self.samples = tuple(range(len(x)))
        self._program, self._compiled, self._inputs = program, compiled, inputs
        noises = compiled.noises(inputs.draws)
        self._buffers = Buffers(compiled.table, x, noises, channels_last=inputs.network.channels_last)
        if compiled.history and inputs.carried is not None:
            self._buffers.memory[1 : 1 + compiled.history].copy_(inputs.carried)
        self._next = self._update(0)

    def evaluate(self, number: int) -> Evaluate:
        assert self._next is not None, "a wave has rows"
        return Evaluate(self._next, self._program.positions[number], self.samples, number)

    def advance(self, number: int, answer: Answer) -> None:
        """Take the output of a wave. number: of the wave in its stage."""
        wave, slots, inputs = self._compiled.waves[number], self._buffers.slots, self._inputs
        m = output_of(answer)
        if inputs.constrain is None:
            self._next = self._update(number + 1, m)
        else:
            self._update(2 * number + 1, m)
            for position, slot in wave.arrivals:
                slots[slot].copy_(inputs.constrain(slots[slot], position, self.samples))
            self._next = self._update(2 * number + 2)
        if inputs.trajectory is not None:
            for position, slot in wave.states:
                inputs.trajectory.record(position, slots[slot].clone(), self.samples)
            for position, carried in wave.carried:
                vectors = [slots[slot] for slot in carried]
                found = torch.stack(vectors) if vectors else self._buffers.memory[:0]
                inputs.trajectory.record_carried(position, found, self.samples)

    def checkpoint(self, completed: Completed) -> Checkpoint:
        """The sample that has just been completed; a copy."""
        iteration, slot, entry, told = completed
        sample, buffers = self._buffers.slots[slot].clone(), self._buffers
        change = stationary = None
        if entry is not None:
            change = buffers.change[entry]
            stationary = ~buffers.moved[iteration] if self._compiled.table.records_moved else None
        exact = iteration == self._program.exact_iteration
        changes = None if told is None else buffers.change
        return Checkpoint(iteration, sample, self.samples, change, exact, stationary, told=told, changes=changes)

    def keep(self, running: tuple[int, ...]) -> None:
        """Continue with the samples at these positions only."""
        if len(running) < len(self.samples):
            self.samples = tuple(self.samples[position] for position in running)
            self._buffers.keep(running)
            if self._next is not None:
                self._next = self._next[:, list(running)]

    def enter(self, stage: CompiledProgram) -> None:
        """Go on with the waves of the next stage."""
        self._compiled = stage
        self._buffers.grow(stage.table)

    def _update(self, number: int, m: Tensor | None = None) -> Tensor | None:
        table, guidance, network = self._compiled.table, self._inputs.guidance, self._inputs.network
        given: Tensor | None = wave_update(table, number, self._buffers, m, guidance=guidance, network=network)
        return given


def run(x: Tensor, program: Program, stages: Sequence[CompiledProgram], inputs: SolverInputs) -> Core:
    """Run a program with these updates: a checkpoint for every sample that it completes."""
    waves, number = Waves(x, program, stages[0], inputs), 0
    result = torch.empty_like(x)
    for stage in stages:
        if stage is not stages[0]:
            waves.enter(stage)
        for place, wave in enumerate(stage.waves):
            waves.advance(place, (yield waves.evaluate(number)))
            number += 1
            for completed in wave.completed:
                found = waves.checkpoint(completed)
                running = samples_of((yield found), found.samples)
                if len(found.samples) == len(result):
                    result.copy_(found.sample)
                else:
                    result[list(found.samples)] = found.sample
                if found.iteration == program.num_iterations or not running:
                    return result
                waves.keep(running)
    raise AssertionError("a program ends with a checkpoint")
