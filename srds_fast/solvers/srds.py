"""SRDS, Self-Refining Diffusion Samplers (Selvam, Merchant, Ermon, NeurIPS 2024): Parareal in time.

    x_{i+1}^p = F(x_i^{p-1}) + ( G(x_i^p) - G(x_i^{p-1}) )

F are the fine steps of a block, G one jump across it. The bracket is computed first: it is bitwise zero once its two
terms agree, and F's result is then returned untouched. Boundary i is the sequential one from iteration i on.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..noise import NoiseTable
from ..program import Boundary, Program
from ..steps import ITS_X0, CoarseSolver, Coefficients, Like, StepTable, chained, fine_step, second_order
from .core import NOTHING, Checkpoint, Core, Evaluate, Extras, output_of, samples_of
from .exchange import Layout, Output, Sum, exchanges


def srds(
    x: Tensor,
    noise: NoiseTable,
    program: Program,
    coarse_solver: CoarseSolver = "2m",
    extras: Extras = NOTHING,
    *,
    watch_bits: bool = False,
) -> Core:
    """Run an SRDS program.

    Multistep fine steps look back at the x0 of the step before, so the state at a boundary is (x, that x0). Both go
    through the same correction; the coarse solver's word for the second is the x0 at the boundary before.

    Args:
        x: starting noise, [batch, ...]; its dtype is the dtype of the state.
        noise: table of N steps.
        program: `program.srds(N, ...)`.
        coarse_solver: "ddim" (first order) or "2m" (DPM-Solver++(2M), reuses the output at the boundary before).
        extras: noise of stochastic steps, constraint, trajectory.
        watch_bits: fill `Checkpoint.still`.
    """
    tables = _tables(noise, program, coarse_solver, Like.of(x))
    constrain, trajectory = extras.constrain, extras.trajectory
    draws = None if extras.draws is None else extras.draws.unbind()
    jump_noise = None if extras.draws is None else _jump_noise(extras.draws, tables.spreads, program)
    moves = _Moves(program, watch_bits)
    # what waves write for later ones to read: a slot a row, see `exchange`
    memory = x.new_empty(tables.layout.num_slots, *x.shape)
    slots = memory.unbind()
    slots[0].copy_(x)
    result = torch.empty_like(x)
    samples = tuple(range(len(x)))

    for number, (wave, exchange) in enumerate(zip(program, tables.layout.waves, strict=True)):
        # every output of a wave is the same elementwise formula: a few operations, however many rows there are
        reads, sources, writes = tables.indices[number]
        states = memory.index_select(0, reads)
        here = states[: len(wave.rows)]
        m = output_of((yield Evaluate(here, program.positions[number], samples, number)), here)
        made = tables.steps.advance(number, states, m if sources is None else m.index_select(0, sources))
        solves, steps = exchange.solves, exchange.steps
        if tables.way_back is not None and steps:
            x0 = made[-len(steps) :]
            behind = [None if slot is None else slots[slot] for slot in exchange.behind]
            made[solves] += tables.steps.d[number][solves] * _behind(steps, behind, x0, tables.way_back)
            if trajectory is not None:
                for step, value in zip(steps, x0, strict=True):
                    trajectory.record_x0(step.row.position, value, samples)
        if draws is not None and steps:
            z = torch.stack([draws[step.row.position] for step in steps])
            made[solves] += tables.steps.spread[number][solves] * z
        memory.index_copy_(0, writes, made)
        for jump, lead in exchange.leads:
            slots[jump].add_(slots[lead])
        if jump_noise is not None:
            for output in exchange.outputs[: solves.start]:
                slots[output.slot].add_(jump_noise[output.row.block])
        if constrain is not None:
            for output in exchange.outputs[: solves.stop]:
                slots[output.slot].copy_(constrain(slots[output.slot], output.arrives, samples))
        if trajectory is not None:
            for step in steps:
                if step.arrives < program.bounds[step.row.block + 1]:
                    trajectory.record(step.arrives, slots[step.slot].clone(), samples)

        for born, state, x0_there in exchange.births:
            _correct(state, slots)
            if x0_there is not None:
                _correct(x0_there, slots)
            value = slots[state.slot]
            if trajectory is not None:
                trajectory.record(program.bounds[born.boundary], value.clone(), samples)
            is_whole = born.boundary == program.num_blocks
            if not (is_whole or watch_bits):
                continue
            value = value.clone()
            change, still = moves.see(born, value)
            if not is_whole:
                continue
            exact = born.iteration == program.num_blocks
            running = samples_of((yield Checkpoint(born.iteration, value, samples, change, exact, still)), samples)
            if len(samples) == len(result):
                result.copy_(value)
            else:
                result[list(samples)] = value
            if born.iteration == program.num_iterations or not running:
                return result
            if len(running) < len(samples):
                samples = tuple(samples[position] for position in running)
                memory = memory[:, list(running)]
                slots = memory.unbind()
                moves.keep(running)
                if draws is not None:
                    draws = tuple(value[list(running)] for value in draws)
                if jump_noise is not None:
                    jump_noise = [value[list(running)] for value in jump_noise]
    raise AssertionError("a program ends with a checkpoint")


def _correct(value: Sum, slots: tuple[Tensor, ...]) -> None:
    """F(x^{p-1}) + ( G(x^p) - G(x^{p-1}) ), where it is not F or G alone."""
    if value.bracket is not None:
        jump, jump_before = value.bracket
        slots[value.slot].add_(slots[jump] - slots[jump_before])


def _behind(steps: tuple[Output, ...], behind: list[Tensor | None], x0: Tensor, way_back: list[float]) -> Tensor:
    """What multistep fine steps look back at: the x0 of the step before, [steps, samples, ...].

    The first step of a solve looks back across the boundary, at what the solve before left there. The coarse sweep has
    no such step: it interpolates between the x0 at its boundaries, along the log-SNR. The first step of the grid does
    not look back; it is given its own x0.
    """
    found = []
    for number, (step, value) in enumerate(zip(steps, behind, strict=True)):
        row = step.row
        if value is None:
            value = x0[number]
        elif row.iteration == 0 and row.step == 0:
            value = x0[number] + (value - x0[number]) * way_back[row.block]
        found.append(value)
    return torch.stack(found)


class _Moves:
    """How far the boundaries move from one iteration to the next: the last one, and every one if bits are watched."""

    def __init__(self, program: Program, watch_bits: bool) -> None:
        self._latest: dict[int, Tensor] = {}
        self._moved: dict[int, Tensor] = {}
        self._watch_bits = watch_bits
        self._last = program.num_blocks

    def see(self, born: Boundary, value: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Take note of a boundary. Of the last one: its change, and whether the iteration moved no bit."""
        iteration, boundary = born
        previous, self._latest[boundary] = self._latest.get(boundary), value
        if previous is None:
            return None, None
        if self._watch_bits:
            moved = value != previous
            self._moved[iteration] = self._moved[iteration] | moved if iteration in self._moved else moved
        if boundary < self._last:
            return None, None
        change = (value - previous).abs().flatten(1).mean(1)
        return change, ~self._moved.pop(iteration).flatten(1).any(1) if self._watch_bits else None

    def keep(self, running: tuple[int, ...]) -> None:
        """Go on with these positions of the samples only."""
        _keep(self._latest, running)
        _keep(self._moved, running)


class _Tables(NamedTuple):
    """What a run knows before its first wave.

    Attributes:
        layout: what each wave reads and writes.
        steps: coefficients of all outputs.
        indices: of each wave, as tensors: the slots its states are read from, the network's row that each output is
            made from (None where every row has one output, in order), the slots the outputs are written to.
        spreads: for stochastic schedulers, of each block the weights of the noise that its fine steps add.
        way_back: for multistep schedulers, of each block: how far the step before its first lies from there towards
            the boundary before, in units of the log-SNR between.
    """

    layout: Layout
    steps: StepTable
    indices: list[tuple[Tensor, Tensor | None, Tensor]]
    spreads: list[list[float]]
    way_back: list[float] | None


@lru_cache(maxsize=64)
def _tables(noise: NoiseTable, program: Program, coarse_solver: CoarseSolver, like: Like) -> _Tables:
    bounds = program.bounds
    fine = [fine_step(noise, index) for index in range(noise.num_steps)]
    carries_x0 = any(step.d != 0.0 for step in fine)
    jump: list[Coefficients] = []
    spreads: list[list[float]] = []
    for block in range(program.num_blocks):
        start, stop = bounds[block], bounds[block + 1]
        previous = bounds[block - 1] if block > 0 and coarse_solver == "2m" else None
        if noise.momentum is not None or noise.spread is not None:
            coefficients, weights = chained(noise, previous, start, stop)
            jump.append(coefficients)
            spreads.append(weights)
        else:
            jump.append(second_order(noise, previous, start, stop))
    led = tuple(block for block, coefficients in enumerate(jump) if coefficients.d != 0.0)
    layout = exchanges(program, led, carries_x0)

    def coefficients_of(output: Output) -> Coefficients:
        row = output.row
        match output.kind:
            case "fine":
                return fine[row.position]
            case "jump":
                return jump[row.block]._replace(d=0.0)
            case "lead":
                return ITS_X0._replace(c=jump[row.block + 1].d)
        return ITS_X0

    outputs = [output for exchange in layout.waves for output in exchange.outputs]
    widths = [len(exchange.outputs) for exchange in layout.waves]
    positions = [output.row.position for output in outputs]
    steps = StepTable(noise, positions, [coefficients_of(output) for output in outputs], like, widths)
    states = [slot for exchange in layout.waves for slot in exchange.states]
    sources, slots = [output.source for output in outputs], [output.slot for output in outputs]
    columns = torch.tensor([states, sources, slots]).to(like.device)
    indices = [
        (reads, None if len(reads) == len(wave.rows) else rows, writes)
        for wave, reads, rows, writes in zip(program, *(column.split(widths) for column in columns), strict=True)
    ]
    return _Tables(layout, steps, indices, spreads, _way_back(noise, program) if carries_x0 else None)


def _jump_noise(draws: Tensor, spreads: list[list[float]], program: Program) -> list[Tensor]:
    """The noise that the fine steps of each block add up to, [batch, ...]."""
    return [
        torch.tensordot(draws.new_tensor(weights), draws[start:stop], dims=1)
        for weights, start, stop in zip(spreads, program.bounds, program.bounds[1:], strict=False)
    ]


def _way_back(noise: NoiseTable, program: Program) -> list[float]:
    log_snr = (noise.alpha / noise.sigma).log().tolist()
    way_back = [0.0]
    for before, start in zip(program.bounds[:-2], program.bounds[1:-1], strict=True):
        way = (log_snr[start] - log_snr[start - 1]) / (log_snr[start] - log_snr[before])
        way_back.append(way if math.isfinite(way) else 0.0)
    return way_back


def _keep(tensors: MutableMapping[Any, Tensor], running: tuple[int, ...]) -> None:
    """Drop the samples that have finished from every tensor [samples, ...] of the table."""
    for key, tensor in tensors.items():
        tensors[key] = tensor[list(running)]
