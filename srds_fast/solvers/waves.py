"""A program as updates between network calls, and the memory they work on: what all cores of blocks share.

The maths is in the coefficients (`steps`), the order in the exchange of slots (`exchange`), the arithmetic in one
launch per wave (`kernels.wave_update`). Here the three are put together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.common.layout import with_inner_layout
from ..kernels.wave_update import Buffers, Correction, Gather, Step, Update, WaveTable, wave_update
from ..noise import NoiseTable
from ..program import Program
from ..steps import ITS_X0, CoarseSolver, Coefficients, Like, chained, fine_step, second_order
from .core import Answer, Checkpoint, Evaluate, Extras, output_of
from .exchange import Birth, Exchange, Layout, Output, Sum, exchanges


class Waves:
    """The waves of one run, one after another: `evaluate` tells what the network is given, `update` takes its output.

    Args:
        x: starting noise, [batch, ...]; its dtype is the dtype of the state.
        noise: table of N steps.
        program: the waves.
        coarse_solver: of the jumps.
        extras: noise of stochastic steps, constraint, trajectory, history, the network's wishes.
        watched: compare every boundary with the iteration before, bit by bit.

    Attributes:
        samples: which samples of the original batch still run, in order.
    """

    def __init__(
        self,
        x: Tensor,
        noise: NoiseTable,
        program: Program,
        coarse_solver: CoarseSolver,
        extras: Extras,
        *,
        watched: bool = False,
    ) -> None:
        self.samples = tuple(range(len(x)))
        self._program = program
        self._extras = extras
        self._updates = _updates(
            noise,
            program,
            coarse_solver,
            Like.of(x),
            given=extras.x0_prev is not None,
            scaled=extras.scaled,
            watched=watched,
            apart=extras.constrain is not None,
        )
        noises = _noises(extras.draws, self._updates.spreads, program)
        self._buffers = Buffers(self._updates.table, x, noises, channels_last=extras.network.channels_last)
        if extras.x0_prev is not None:
            self._buffers.slots[1].copy_(extras.x0_prev)
        self._input = self._run(0)

    def evaluate(self, number: int) -> Evaluate:
        """Wave `number`, the next one."""
        assert self._input is not None, "a wave has rows"
        return Evaluate(self._input, self._program.positions[number], self.samples, number)

    def update(self, number: int, answer: Answer) -> tuple[Birth, ...]:
        """Take the output of wave `number`; returns the boundaries that came into being."""
        wave = self._updates.layout.waves[number]
        m = with_inner_layout(output_of(answer), self._buffers.memory)
        constrain = self._extras.constrain
        if constrain is None:
            self._input = self._run(number + 1, m)
        else:
            self._run(2 * number + 1, m)
            slots = self._buffers.slots
            for output in wave.outputs:
                if output.kind in ("jump", "fine"):
                    slots[output.slot].copy_(constrain(slots[output.slot], output.arrives, self.samples))
            self._input = self._run(2 * number + 2)
        if self._extras.trajectory is not None:
            self._record(wave)
        return wave.births

    def value(self, birth: Birth) -> Tensor:
        """A boundary that has just come into being, [samples, ...]; a copy."""
        value: Tensor = self._buffers.slots[birth.state.slot].clone()
        return value

    def change(self, birth: Birth) -> Tensor | None:
        """[samples], mean absolute difference to the same boundary an iteration before; None if there is none."""
        return None if birth.compare is None else self._buffers.change[birth.boundary.iteration]

    def still(self, birth: Birth) -> Tensor | None:
        """[samples], no boundary moved by a bit in this iteration; None if they are not watched."""
        watched = self._updates.table.records_moved and birth.compare is not None
        return ~self._buffers.moved[birth.boundary.iteration] if watched else None

    def keep(self, running: tuple[int, ...]) -> None:
        """Go on with these positions of the samples only."""
        if len(running) < len(self.samples):
            self.samples = tuple(self.samples[position] for position in running)
            self._buffers.keep(running)
            if self._input is not None:
                self._input = self._input[:, list(running)]

    def _run(self, number: int, m: Tensor | None = None) -> Tensor | None:
        extras, table = self._extras, self._updates.table
        given: Tensor | None = wave_update(
            table, number, self._buffers, m, guidance=extras.guidance, network=extras.network
        )
        return given

    def _record(self, wave: Exchange) -> None:
        trajectory, slots, bounds = self._extras.trajectory, self._buffers.slots, self._program.bounds
        assert trajectory is not None
        for output in wave.outputs:
            row = output.row
            if output.kind == "fine" and output.arrives < bounds[row.block + 1]:
                trajectory.record(output.arrives, slots[output.slot].clone(), self.samples)
            elif output.kind == "x0":
                trajectory.record_x0(row.position, slots[output.slot].clone(), self.samples)
        for birth in wave.births:
            trajectory.record(bounds[birth.boundary.boundary], self.value(birth), self.samples)


class CountedWaves:
    """The same waves on memory that stays, every one of them the same operations but for a counter on the device.

    So `start`, and what lies between `evaluate` and the end of `update`, can be recorded, the latter once for each
    width, and repeated for every wave and every run.

    Args:
        x: [batch, ...] in the dtype of the state, from which every run starts; as `extras.draws`, the memory is read
            anew by `start`.
        noise, program, coarse_solver, watched: as of `Waves`.
        extras: noise of stochastic steps, the network's wishes, guidance.

    Attributes:
        program: the same.
        counter: [1] int32, on the device: the number of updates done.
    """

    def __init__(
        self,
        x: Tensor,
        noise: NoiseTable,
        program: Program,
        coarse_solver: CoarseSolver,
        extras: Extras,
        *,
        watched: bool = False,
    ) -> None:
        assert extras.constrain is None
        assert extras.trajectory is None
        self._x, self.program, self._extras = x, program, extras
        self._updates = _updates(
            noise,
            program,
            coarse_solver,
            Like.of(x),
            given=False,
            scaled=extras.scaled,
            watched=watched,
            apart=False,
        )
        table = self._updates.table
        noises = _noises(extras.draws, self._updates.spreads, program)
        self._buffers = Buffers(table, x, noises, channels_last=extras.network.channels_last)
        table.prepare()
        self._input = extras.network.empty(table.most_gathers, x)
        self.counter = torch.zeros(1, dtype=torch.int32, device=x.device)

    def start(self) -> None:
        """Begin a run: what the first wave is given is there."""
        self._buffers.restart(self._x, _noises(self._extras.draws, self._updates.spreads, self.program))
        branches = self._extras.network.branches
        first = wave_update(self._updates.table, 0, self._buffers, network=self._extras.network)
        assert first is not None, "a wave has rows"
        first = first.unflatten(0, (branches, -1))
        self._input.unflatten(0, (branches, -1))[:, : first.shape[1]].copy_(first)
        self.counter.fill_(1)

    def evaluate(self, number: int) -> Evaluate:
        """The wave that the counter has come to; number: any wave of its width."""
        positions = self.program.positions[number]
        rows = self._input.unflatten(0, (self._extras.network.branches, -1))[:, : len(positions)].flatten(0, 1)
        return Evaluate(rows, positions, tuple(range(len(self._x))), number)

    def update(self, m: Tensor) -> None:
        """Take its output, [branches * rows, samples, ...]."""
        m = with_inner_layout(m, self._buffers.memory)
        table, extras = self._updates.table, self._extras
        wave_update(
            table, self.counter, self._buffers, m, guidance=extras.guidance, network=extras.network, out=self._input
        )

    def warm_up(self, dtype: torch.dtype) -> None:
        """Launch every kind of update once: a first launch makes what cannot be made in a recording."""
        branches = 1 if self._extras.guidance is None else len(self._extras.guidance)
        self.start()
        self.counter.fill_(len(self._updates.table.updates))  # beyond the last one nothing is done
        for width in sorted({len(positions) for positions in self.program.positions}):
            self.update(self._x.new_zeros(branches * width, *self._x.shape, dtype=dtype))
        self.counter.zero_()

    def memory(self) -> tuple[Tensor, ...]:
        """All that lasts from wave to wave."""
        noises = () if self._buffers.noises is None else (self._buffers.noises,)
        return self._buffers.memory, self._buffers.change, self._buffers.moved, self._input, self.counter, *noises

    def widest(self) -> Evaluate:
        """A wave as wide as any."""
        return self.evaluate(max(range(len(self.program)), key=lambda number: len(self.program.positions[number])))

    def read_by_network(self) -> tuple[Tensor, ...]:
        """Memory that what runs the network reads."""
        return self._input, self.counter

    def born(self, number: int) -> tuple[Birth, ...]:
        """The whole samples that wave `number` brings into being."""
        births = self._updates.layout.waves[number].births
        return tuple(birth for birth in births if birth.boundary.boundary == self.program.num_blocks)

    def checkpoint(self, birth: Birth) -> Checkpoint:
        """A sample that has just come into being, in memory that later waves use again."""
        iteration, buffers, samples = birth.boundary.iteration, self._buffers, tuple(range(len(self._x)))
        sample, exact = buffers.slots[birth.state.slot], iteration == self.program.num_blocks
        if birth.compare is None:
            return Checkpoint(0, sample, samples, None, exact)
        still = ~buffers.moved[iteration] if self._updates.table.records_moved else None
        return Checkpoint(iteration, sample, samples, buffers.change[iteration], exact, still)


@dataclass(frozen=True)
class _Updates:
    """What a run knows before its first wave.

    Attributes:
        layout: what each wave reads and writes.
        table: the updates: the first one brings the starting noise to the network, then one for each wave, or two where
            states are constrained in between.
        spreads: for stochastic schedulers, of each block the weights of the noise that its fine steps add, [steps].
    """

    layout: Layout
    table: WaveTable
    spreads: list[Tensor]


def wave_table(noise: NoiseTable, program: Program, coarse_solver: CoarseSolver, x: Tensor) -> WaveTable:
    """The updates of a program for states like x, [samples, ...], with the scheduler's input scale."""
    return _updates(
        noise, program, coarse_solver, Like.of(x), given=False, scaled=True, watched=False, apart=False
    ).table


@lru_cache(maxsize=64)
def _updates(
    noise: NoiseTable,
    program: Program,
    coarse_solver: CoarseSolver,
    like: Like,
    *,
    given: bool,
    scaled: bool,
    watched: bool,
    apart: bool,
) -> _Updates:
    fine = [fine_step(noise, index) for index in range(noise.num_steps)]
    carries_x0 = any(step.d != 0.0 for step in fine)
    jumps, spreads = _jumps(noise, program, coarse_solver)
    led = tuple(block for block, coefficients in enumerate(jumps) if coefficients.d != 0.0)
    layout = exchanges(program, led, carries_x0, given and carries_x0, watched)
    way_back = _way_back(noise, program) if carries_x0 and jumps else []

    def made(output: Output) -> Step:
        row = output.row
        draw, spread = None, 0.0
        match output.kind:
            case "jump":
                step = jumps[row.block]
                if spreads:
                    draw, spread = noise.num_steps + row.block, 1.0
            case "fine":
                step = _looking_back(fine[row.position], output, way_back)
                if noise.spread is not None:
                    draw, spread = row.position, noise.numbers["spread"][row.position]
            case _:
                step = ITS_X0
        return _made(output, step, noise, draw, spread)

    def entering(wave: int) -> tuple[Gather, ...]:
        if wave == len(program):
            return ()
        scales = [noise.numbers["input_scale"][position] if scaled else 1.0 for position in program.positions[wave]]
        return tuple(map(Gather, layout.waves[wave].states, scales))

    updates = [Update(gathers=entering(0))]
    for number, wave in enumerate(layout.waves):
        values = tuple(made(output) for output in wave.outputs)
        sums = tuple(each for birth in wave.births for each in _sums(birth, program))
        if apart:
            updates += [Update(values), Update((), sums, entering(number + 1))]
        else:
            updates.append(Update(values, sums, entering(number + 1)))
    table = WaveTable(
        updates,
        layout.num_slots,
        program.num_iterations,
        like.dtype,
        like.device,
        like.ndim,
        noise.clip,
        watched,
    )
    on_device = [torch.tensor(weights, dtype=like.dtype, device=like.device) for weights in spreads]
    return _Updates(layout, table, on_device)


def _jumps(
    noise: NoiseTable, program: Program, coarse_solver: CoarseSolver
) -> tuple[list[Coefficients], list[list[float]]]:
    """The jump across each block, and the weights of the noise that its fine steps add; nothing where none jumps."""
    jumps: list[Coefficients] = []
    spreads: list[list[float]] = []
    if not any(row.coarse for wave in program for row in wave.rows):
        return jumps, spreads
    bounds = program.bounds
    for block in range(program.num_blocks):
        start, stop = bounds[block], bounds[block + 1]
        previous = bounds[block - 1] if block > 0 and coarse_solver == "2m" else None
        if noise.momentum is None and noise.spread is None:
            jumps.append(second_order(noise, previous, start, stop))
            continue
        coefficients, weights = chained(noise, previous, start, stop)
        jumps.append(coefficients)
        if noise.spread is not None:
            spreads.append(weights)
    return jumps, spreads


def _looking_back(step: Coefficients, output: Output, way_back: list[float]) -> Coefficients:
    """The step, with the x0 of the step before taken from where it can be had.

    The first step of a solve looks back across the boundary, at what the solve before left there. The coarse sweep has
    no such step: its x0 is interpolated between those at the boundaries, along the log-SNR. A step that has nothing to
    look back at is given its own x0.
    """
    if output.before is None:
        return step._replace(c=step.c + step.d, d=0.0)
    row = output.row
    if way_back and row.iteration == 0 and row.step == 0:
        there = way_back[row.block]
        return step._replace(c=step.c + step.d * (1 - there), d=step.d * there)
    return step


def _made(output: Output, step: Coefficients, noise: NoiseTable, draw: int | None, spread: float) -> Step:
    a, b, c, d = step
    p, q = noise.numbers["p"][output.row.position], noise.numbers["q"][output.row.position]
    if noise.clip is None and c != 0.0:  # x0 is linear in x and m: fewer products in each wave
        a, b, c = a + c * p, b + c * q, 0.0
    if c == 0.0:
        p = q = 0.0
    return Step(output.slot, output.state, output.source, a, b, c, d, p, q, output.before, draw, spread)


def _sums(birth: Birth, program: Program) -> list[Correction]:
    """What is left to do for a boundary once its parts are made: nothing, where one part is the whole of it."""
    boundary, state, x0, compare = birth
    parts: list[tuple[Sum, int | None]] = [(state, compare)]
    if x0 is not None:
        parts.append((x0, None))
    whole = boundary.boundary == program.num_blocks
    return [
        Correction(each.slot, each.bracket, there, boundary.iteration, whole)
        for each, there in parts
        if each.bracket is not None or there is not None
    ]


def _noises(draws: Tensor | None, spreads: list[Tensor], program: Program) -> Tensor | None:
    """The noise of every step, and behind it what the steps of each block add up to, [steps + blocks, batch, ...]."""
    if draws is None or not spreads:
        return draws
    jumps = [
        torch.tensordot(weights, draws[start:stop], dims=1)[None]
        for weights, start, stop in zip(spreads, program.bounds, program.bounds[1:], strict=False)
    ]
    return torch.cat([draws, *jumps])


def _way_back(noise: NoiseTable, program: Program) -> list[float]:
    """Of each block: how far the step before its first lies from there towards the boundary before, in log-SNR."""
    log_snr = (noise.alpha / noise.sigma).log().tolist()
    way_back = [0.0]
    for before, start in zip(program.bounds[:-2], program.bounds[1:-1], strict=True):
        way = (log_snr[start] - log_snr[start - 1]) / (log_snr[start] - log_snr[before])
        way_back.append(way if math.isfinite(way) else 0.0)
    return way_back
