"""CHORDS (Han et al., ICCV 2025): cores that begin further and further along, the slower ones rectify the faster.

When the slower core is evaluated where the faster one began its span, the faster one has just come to the end of it:

    x_fast <- F(x_begin) + ( G(x_slow) - G(x_begin) )

F are the fine steps of the span, G one jump across it. It is the Parareal correction, but made from network outputs
that both cores take anyway: no row is spent on it. The bracket is computed first, so it is bitwise zero where the two
cores agree. The next span of the faster core begins at the value so rectified, as in the authors' code: the slower core
comes there when that span has ended.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.common.layout import with_inner_layout
from ...kernels.wave_update import Buffers, Correction, Gather, Step, Update, WaveTable, wave_update
from ...schedulers.steps import ITS_X0, Coefficients, TensorSpec, chained, fine_step, first_order
from ...schedulers.table import NoiseTable
from ..contract import NO_INPUTS, Answer, Checkpoint, Core, Evaluate, SolverInputs, output_of, samples_of
from ..program import Row
from .program import Cores


def chords(
    x: Tensor, noise: NoiseTable, program: Cores, inputs: SolverInputs = NO_INPUTS, *, bitwise: bool = False
) -> Core:
    """Run a CHORDS program: a checkpoint for every core, the fastest first, core 0 (the sequential sampler) last.

    Multistep fine steps look back at the x0 of the step before: it belongs to a core's state, and is rectified with it;
    a jump's word for it is the x0 it departs with. Stochastic steps take the noise drawn for them, whichever core takes
    them; the jump that starts a core adds up the noise of the steps it replaces. In the bracket it would cancel, and is
    left out.

    Args:
        x: starting noise, [batch, ...]; its dtype is the dtype of the state.
        noise: table of N steps.
        program: `chords_program.chords(N, starts)`.
        inputs: noise of stochastic steps, constraint, trajectory, history, the network's wishes.
        bitwise: changes nothing. `Checkpoint.stationary` remains None: two cores that agree to the bit say nothing of
            the slower ones, which have not arrived yet.
    """
    waves = _Waves(x, noise, program, inputs)
    result = torch.empty_like(x)
    for number, wave in enumerate(program):
        waves.update(number, (yield waves.evaluate(number)))
        for iteration, _ in wave.boundaries:
            value, samples = waves.value(iteration), waves.samples
            exact = iteration == program.num_iterations
            running = samples_of((yield Checkpoint(iteration, value, samples, waves.change(iteration), exact)), samples)
            if len(samples) == len(result):
                result.copy_(value)
            else:
                result[list(samples)] = value
            if exact or not running:
                return result
            waves.keep(running)
    raise AssertionError("a program ends with a checkpoint")


class _Waves:
    """The waves of one run, one after another: `evaluate` tells what the network is given, `update` takes its output.

    Attributes:
        samples: which samples of the original batch still run, in order.
    """

    def __init__(self, x: Tensor, noise: NoiseTable, program: Cores, inputs: SolverInputs) -> None:
        self.samples = tuple(range(len(x)))
        self._program = program
        self._inputs = inputs
        self._updates = _updates(
            noise,
            program,
            TensorSpec.of(x),
            given=inputs.x0_prev is not None,
            scaled=inputs.scaled,
            apart=inputs.constrain is not None,
        )
        noises = _noises(inputs.draws, self._updates.spreads, program)
        self._buffers = Buffers(self._updates.table, x, noises, channels_last=inputs.network.channels_last)
        if inputs.x0_prev is not None and self._updates.carries_x0:
            self._buffers.slots[1].copy_(inputs.x0_prev)
        self._input = self._run(0)

    def evaluate(self, number: int) -> Evaluate:
        """Wave `number`, the next one."""
        assert self._input is not None, "a wave has rows"
        return Evaluate(self._input, self._program.positions[number], self.samples, number)

    def update(self, number: int, answer: Answer) -> None:
        """Take the output of wave `number`."""
        wave, constrain = self._updates.waves[number], self._inputs.constrain
        m = with_inner_layout(output_of(answer), self._buffers.memory)
        if constrain is None:
            self._input = self._run(number + 1, m)
        else:
            self._run(2 * number + 1, m)
            slots = self._buffers.slots
            for position, slot in wave.arrivals:
                slots[slot].copy_(constrain(slots[slot], position, self.samples))
            self._input = self._run(2 * number + 2)
        if self._inputs.trajectory is not None:
            for position, slot in wave.states:
                self._inputs.trajectory.record(position, self._buffers.slots[slot].clone(), self.samples)
            for position, slot in wave.x0:
                self._inputs.trajectory.record_x0(position, self._buffers.slots[slot].clone(), self.samples)

    def value(self, iteration: int) -> Tensor:
        """The sample of the core that has just arrived, [samples, ...]; a copy."""
        value: Tensor = self._buffers.slots[self._updates.ends[iteration]].clone()
        return value

    def change(self, iteration: int) -> Tensor | None:
        """[samples], mean absolute difference to the core that arrived before; None for the first."""
        return None if iteration == 0 else self._buffers.change[iteration]

    def keep(self, running: tuple[int, ...]) -> None:
        """Go on with these positions of the samples only."""
        if len(running) < len(self.samples):
            self.samples = tuple(self.samples[position] for position in running)
            self._buffers.keep(running)
            if self._input is not None:
                self._input = self._input[:, list(running)]

    def _run(self, number: int, m: Tensor | None = None) -> Tensor | None:
        inputs, table = self._inputs, self._updates.table
        given: Tensor | None = wave_update(
            table, number, self._buffers, m, guidance=inputs.guidance, network=inputs.network
        )
        return given


class _Arrivals(NamedTuple):
    """Grid positions, and the slots of what has come there in a wave.

    Attributes:
        arrivals: all that steps and jumps have made, before it is rectified.
        states: the cores, where they go on from.
        x0: predicted at these positions; for multistep schedulers only.
    """

    arrivals: tuple[tuple[int, int], ...]
    states: tuple[tuple[int, int], ...]
    x0: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Updates:
    """What a run knows before its first wave.

    Attributes:
        waves: what each wave makes.
        table: the updates: the first one brings the starting noise to the network, then one for each wave, or two where
            states are constrained in between.
        spreads: for stochastic schedulers, of each core but core 0 the weights of the noise of the steps that the jump
            to its start replaces, [steps].
        ends: of each iteration, the slot of its sample.
        carries_x0: an x0 belongs to the state.
    """

    waves: tuple[_Arrivals, ...]
    table: WaveTable
    spreads: list[Tensor]
    ends: tuple[int, ...]
    carries_x0: bool


@lru_cache(maxsize=64)
def _updates(
    noise: NoiseTable, program: Cores, spec: TensorSpec, *, given: bool, scaled: bool, apart: bool
) -> _Updates:
    values = _Values(noise, program, given)
    updates = [Update(gathers=values.entering(0, scaled))]
    waves = []
    for number, wave in enumerate(program):
        made, arrivals = values.made(wave.rows)
        sums = values.sums(number)
        entering = values.entering(number + 1, scaled)
        updates += [Update(made), Update((), sums, entering)] if apart else [Update(made, sums, entering)]
        waves.append(arrivals)
    table = WaveTable(updates, values.num_slots, program.num_iterations, spec.dtype, spec.device, spec.ndim, noise.clip)
    spreads = [torch.tensor(weights, dtype=spec.dtype, device=spec.device) for weights in values.spreads]
    ends = tuple(values.state(program.core(iteration), program.num_steps) for iteration in range(program.num_cores))
    return _Updates(tuple(waves), table, spreads, ends, values.carries_x0)


class _Values:
    """What is made of every network output, and in which slot it is kept.

    Each core has the same few slots: two for its state, one of them written while the other is read, "old" and "new"
    for the jumps from where its span began, by itself and by the slower core; for multistep schedulers the same again
    for the x0 that belong to these. The starting noise is in slot 0; the x0 given with it, if so, in slot 1.

    Attributes:
        spreads: as in `_Updates`.
        carries_x0: an x0 belongs to the state.
    """

    def __init__(self, noise: NoiseTable, program: Cores, given: bool) -> None:
        self._noise, self._program = noise, program
        self._fine = [fine_step(noise, index) for index in range(noise.num_steps)]
        self.carries_x0 = any(step.d != 0.0 for step in self._fine)
        self._slots: defaultdict[tuple[str, int], int] = defaultdict(count().__next__)
        self.state(0, 0)
        self._given = given and self.carries_x0
        if self._given:
            self._behind(0, 0)
        leaps = zip(program.starts, program.starts[1:], strict=False)
        self._leaps = [_jump(noise, start, stop) for start, stop in leaps]
        self.spreads = [] if noise.spread is None else [weights for _, weights in self._leaps]
        # rows evaluated, and of each core the beginnings of the spans that are still to be rectified
        self._done: set[tuple[int, int]] = set()
        self._ahead = [list(reversed(program.begins(core))) for core in range(program.num_cores)]

    @property
    def num_slots(self) -> int:
        """Slots of the memory."""
        return len(self._slots)

    def state(self, core: int, position: int) -> int:
        """Slot of a core's state at a grid position."""
        return self._slots[f"state {position % 2}", core]

    def _behind(self, core: int, position: int) -> int:
        """Slot of the x0 that the step at a grid position looks back at."""
        return self._slots[f"behind {position % 2}", core]

    def made(self, rows: Iterable[Row]) -> tuple[tuple[Step, ...], _Arrivals]:
        """The values made from the outputs of a wave."""
        made, arrivals, states, x0 = [], [], [], []
        for source, row in enumerate(rows):
            core, position = self._program.core(row.iteration), row.position
            self._done.add((core, position))
            stepped = self.state(core, position + 1)
            states.append((position + 1, stepped))
            arrivals.append((position + 1, stepped))
            made.append(self._step(source, core, position))
            for step, arrives, keep, draw in self._jumps(core, position):
                arrivals.append((arrives, keep))
                made.append(self._made(source, core, position, step, keep, draw=draw, spread=1.0))
            for keep in self._x0(core, position):
                made.append(self._made(source, core, position, ITS_X0, keep))
            if self.carries_x0:
                x0.append((position, self._behind(core, position + 1)))
        return tuple(made), _Arrivals(tuple(arrivals), tuple(states), tuple(x0))

    def sums(self, number: int) -> tuple[Correction, ...]:
        """What is left to do after a wave: spans to rectify, and samples to compare with those that came before."""
        program = self._program
        arrived = {program.core(iteration) for iteration, _ in program.waves[number].boundaries}
        sums = []
        for core in reversed(range(program.num_cores)):  # the fastest first: the next one is compared with it
            position = self._rectified(core)
            bracket = None
            if position is not None:
                bracket = self._slots["new", core], self._slots["old", core]
                if self.carries_x0:
                    of_x0 = self._slots["new x0", core], self._slots["old x0", core]
                    sums.append(Correction(self._behind(core, position), of_x0))
            compare = None
            if core in arrived:
                position = program.num_steps
                compare = self.state(core + 1, position) if core + 1 < program.num_cores else None
            if position is not None and (bracket is not None or compare is not None):
                iteration, whole = program.core(core), core in arrived
                sums.append(Correction(self.state(core, position), bracket, compare, iteration, whole))
        return tuple(sums)

    def entering(self, number: int, scaled: bool) -> tuple[Gather, ...]:
        """The states of wave `number`; none behind the last."""
        program, scales = self._program, self._noise.numbers["input_scale"]
        rows = program.waves[number].rows if number < len(program) else ()
        return tuple(
            Gather(self.state(program.core(row.iteration), row.position), scales[row.position] if scaled else 1.0)
            for row in rows
        )

    def _rectified(self, core: int) -> int | None:
        """Where a span of the core ends for which all parts are there now; None if none does."""
        ahead = self._ahead[core]
        if not ahead:
            return None
        end = ahead[-1] + self._program.span(core)
        if not {(core - 1, ahead[-1]), (core, end - 1)} <= self._done:
            return None
        ahead.pop()
        return end

    def _step(self, source: int, core: int, position: int) -> Step:
        """The fine step."""
        step, before = self._fine[position], None
        if self.carries_x0 and (core > 0 or position > 0 or self._given):
            before = self._behind(core, position)
            if core > 0 and position == self._program.starts[core]:
                # the jump has left the x0 it departed with: of the step before it is some way along the line to here
                way = _way_back(self._noise, self._program.starts[core - 1], position)
                step = step._replace(c=step.c + step.d * (1 - way), d=step.d * way)
        else:
            step = step._replace(c=step.c + step.d, d=0.0)
        draw, spread = None, 0.0
        if self._noise.spread is not None:
            draw, spread = position, self._noise.numbers["spread"][position]
        return self._made(source, core, position, step, self.state(core, position + 1), before, draw, spread)

    def _jumps(self, core: int, position: int) -> list[tuple[Coefficients, int, int, int | None]]:
        """The jumps from a row: coefficients, where it arrives, the slot it is kept in, and its noise."""
        program, noise, faster = self._program, self._noise, core + 1
        jumps: list[tuple[Coefficients, int, int, int | None]] = []
        if position in program.begins(core):
            end = position + program.span(core)
            jumps.append((_jump(noise, position, end)[0], end, self._slots["old", core], None))
        if faster == program.num_cores:
            return jumps
        if position in program.begins(faster):
            end = position + program.span(faster)
            jumps.append((_jump(noise, position, end)[0], end, self._slots["new", faster], None))
        if position == program.starts[core]:
            start = program.starts[faster]
            draw = noise.num_steps + core if self.spreads else None
            jumps.append((self._leaps[core][0], start, self.state(faster, start), draw))
        return jumps

    def _x0(self, core: int, position: int) -> list[int]:
        """The slots that keep the x0 of a row."""
        if not self.carries_x0:
            return []
        program, faster = self._program, core + 1
        slots = [self._behind(core, position + 1)]
        if position in program.begins(core):
            slots.append(self._slots["old x0", core])
        if faster < program.num_cores:
            if position in program.begins(faster):
                slots.append(self._slots["new x0", faster])
            if position == program.starts[core]:
                slots.append(self._behind(faster, program.starts[faster]))
        return slots

    def _made(
        self,
        source: int,
        core: int,
        position: int,
        step: Coefficients,
        keep: int,
        before: int | None = None,
        draw: int | None = None,
        spread: float = 0.0,
    ) -> Step:
        noise = self._noise
        a, b, c, d = step
        p, q = noise.numbers["p"][position], noise.numbers["q"][position]
        if noise.clip is None and c != 0.0:  # x0 is linear in x and m: fewer products in each wave
            a, b, c = a + c * p, b + c * q, 0.0
        if c == 0.0:
            p = q = 0.0
        return Step(keep, self.state(core, position), source, a, b, c, d, p, q, before, draw, spread)


def _jump(noise: NoiseTable, start: int, stop: int) -> tuple[Coefficients, list[float]]:
    """One jump, first order in the x0 known at `start`, and the weights of the noise of the steps it replaces."""
    if noise.momentum is None and noise.spread is None:
        return first_order(noise, start, stop), []
    return chained(noise, None, start, stop)


def _way_back(noise: NoiseTable, before: int, start: int) -> float:
    """How far the step before `start` lies from there towards `before`, in log-SNR."""
    log_snr = [(noise.alpha[index] / noise.sigma[index]).log() for index in (before, start - 1, start)]
    way = float((log_snr[2] - log_snr[1]) / (log_snr[2] - log_snr[0]))
    return way if math.isfinite(way) else 0.0


def _noises(draws: Tensor | None, spreads: list[Tensor], program: Cores) -> Tensor | None:
    """The noise of every step, and behind it that of the jumps that start cores, [steps + K - 1, batch, ...]."""
    if draws is None or not spreads:
        return draws
    leaps = [
        torch.tensordot(weights, draws[start:stop], dims=1)[None]
        for weights, start, stop in zip(spreads, program.starts, program.starts[1:], strict=False)
    ]
    return torch.cat([draws, *leaps])
