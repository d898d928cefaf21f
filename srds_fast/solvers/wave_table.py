"""The coefficients of every wave as one device table, computed once for a program."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.wave_update import Correction, Gather, Step, Update, WaveTable
from ..schedulers.steps import ITS_X0, CoarseSolver, Coefficients, TensorSpec, chained, fine_step, second_order
from ..schedulers.table import NoiseTable
from .dataflow import Completed, Layout, Output, Sum, exchanges
from .program import Program


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
        noise, program, coarse_solver, TensorSpec.of(x), given=False, scaled=True, watched=False, apart=False
    ).table


@lru_cache(maxsize=64)
def _updates(
    noise: NoiseTable,
    program: Program,
    coarse_solver: CoarseSolver,
    spec: TensorSpec,
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
        sums = tuple(each for completed in wave.completions for each in _sums(completed, program))
        if apart:
            updates += [Update(values), Update((), sums, entering(number + 1))]
        else:
            updates.append(Update(values, sums, entering(number + 1)))
    table = WaveTable(
        updates,
        layout.num_slots,
        program.num_iterations,
        spec.dtype,
        spec.device,
        spec.ndim,
        noise.clip,
        watched,
    )
    on_device = [torch.tensor(weights, dtype=spec.dtype, device=spec.device) for weights in spreads]
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


def _sums(completed: Completed, program: Program) -> list[Correction]:
    """What is left to do for a boundary once its parts are made: nothing, where one part is the whole of it."""
    boundary, state, x0, compare = completed
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
