"""SRDS, Self-Refining Diffusion Samplers (Selvam, Merchant, Ermon, NeurIPS 2024): Parareal in time.

    x_{i+1}^p = F(x_i^{p-1}) + ( G(x_i^p) - G(x_i^{p-1}) )

F are the fine steps of a block, G one jump across it. The bracket is computed first: it is bitwise zero once its two
terms agree, and F's result is then returned untouched. Boundary i is the sequential one from iteration i on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..noise import NoiseTable
from ..program import Boundary, Program, Row, settled
from ..steps import CoarseSolver, Coefficients, StepTable, chained, fine_step, second_order
from .core import NOTHING, Checkpoint, Core, Evaluate, Extras, output_of, samples_of


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
    fine, coarse, jump_noise = _tables(x, noise, program, coarse_solver, extras.draws)
    boundaries = _Boundaries(x, program, watch_bits)
    points = {(0, 0): x}  # where each solve (iteration, block) stands, until it is evaluated
    history = _History(program)
    lookback = _Lookback(noise, program) if fine.uses_history else None
    constrain, trajectory, draws = extras.constrain, extras.trajectory, extras.draws
    fine_done = coarse_done = 0
    result = torch.empty_like(x)
    samples = tuple(range(len(x)))

    for wave in program:
        rows = wave.rows
        jumps = [row for row in rows if row.coarse]
        solves = [row for row in rows if row.fine]
        # a fine row is the last reader of its point; a coarse row of its own may come before it
        keys = [(row.iteration, row.block) for row in rows]
        here = torch.stack([points.pop(key) if row.fine else points[key] for key, row in zip(keys, rows, strict=True)])
        m = output_of((yield Evaluate(here, tuple(row.position for row in rows), samples)), here)

        if jumps:
            these = slice(coarse_done, coarse_done := coarse_done + len(jumps))
            x_jump, m_jump = here[: len(jumps)], m[: len(jumps)]
            x0 = x0_prev = None
            if coarse.uses_history or lookback is not None:
                x0 = coarse.predict_x0(these, x_jump, m_jump)
            if coarse.uses_history and x0 is not None:
                x0_prev = torch.stack([history.before(row, own) for row, own in zip(jumps, x0, strict=True)])
                history.x0.update(zip((Boundary(row.iteration, row.block) for row in jumps), x0, strict=True))
            if lookback is not None and x0 is not None:
                lookback.jumped.update(zip(((row.iteration, row.block) for row in jumps), x0, strict=True))
            landed = coarse.advance(these, x_jump, m_jump, x0, x0_prev)
            for row, value in zip(jumps, landed, strict=True):
                if jump_noise is not None:
                    value = value + jump_noise[row.block]
                if constrain is not None:
                    value = constrain(value, program.bounds[row.block + 1], samples)
                boundaries.jumped[row.iteration, row.block] = value
        if solves:
            these = slice(fine_done, fine_done := fine_done + len(solves))
            x_fine, m_fine = here[-len(solves) :], m[-len(solves) :]
            x0 = x0_prev = None
            if lookback is not None:
                x0 = fine.predict_x0(these, x_fine, m_fine)
                x0_prev = torch.stack([lookback.before(row, own) for row, own in zip(solves, x0, strict=True)])
                lookback.after(solves, x0)
            z = None if draws is None else torch.stack([draws[row.position] for row in solves])
            stepped = fine.advance(these, x_fine, m_fine, x0, x0_prev, z)
            for number, (row, value) in enumerate(zip(solves, stepped, strict=True)):
                ends_block = row.position + 1 == program.bounds[row.block + 1]
                if constrain is not None:
                    value = constrain(value, row.position + 1, samples)
                (boundaries.solved if ends_block else points)[row.iteration, row.block] = value
                if trajectory is not None and not ends_block:
                    trajectory.record(row.position + 1, value, samples)
                if trajectory is not None and x0 is not None:
                    trajectory.record_x0(row.position, x0[number], samples)

        for born in wave.boundaries:
            sample, change, still = boundaries.make(born)
            if trajectory is not None:
                trajectory.record(program.bounds[born.boundary], sample, samples)
            if born.boundary < program.num_blocks:
                points[born] = sample
                if lookback is not None:
                    lookback.make(born)
                continue
            exact = born.iteration == program.num_blocks
            running = samples_of((yield Checkpoint(born.iteration, sample, samples, change, exact, still)), samples)
            result[list(samples)] = sample
            if born.iteration == program.num_iterations or not running:
                return result
            if len(running) < len(samples):
                samples = tuple(samples[position] for position in running)
                boundaries.keep(running)
                _keep(points, running)
                _keep(history.x0, running)
                if lookback is not None:
                    lookback.keep(running)
                if draws is not None:
                    draws = draws[:, list(running)]
                if jump_noise is not None:
                    jump_noise = [value[list(running)] for value in jump_noise]
    raise AssertionError("a program ends with a checkpoint")


class _Corrected:
    """A quantity at the boundaries: what the fine solves and the jumps say of it, and the correction of the one by the
    other."""

    def __init__(self) -> None:
        self.solved: dict[tuple[int, int], Tensor] = {}
        self.jumped: dict[tuple[int, int], Tensor] = {}

    def corrected(self, born: Boundary) -> Tensor:
        """F(x^{p-1}) + ( G(x^p) - G(x^{p-1}) ) at a boundary; the coarse sweep has G alone, the exact prefix F."""
        iteration, block = born.iteration, born.boundary - 1
        if iteration == 0:
            return self.jumped[0, block]
        value = self.solved.pop((iteration - 1, block))
        before = self.jumped.pop((iteration - 1, block))
        return value + (self.jumped[iteration, block] - before) if iteration <= block else value

    def keep(self, running: tuple[int, ...]) -> None:
        """Go on with these positions of the samples only."""
        _keep(self.solved, running)
        _keep(self.jumped, running)


class _Boundaries(_Corrected):
    """The states at the boundaries, and how far they moved."""

    def __init__(self, x: Tensor, program: Program, watch_bits: bool) -> None:
        super().__init__()
        self._latest: dict[int, Tensor] = {}
        self._moved: dict[int, Tensor] = {}
        self._watch_bits = watch_bits
        self._last = program.num_blocks

    def make(self, born: Boundary) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Value of a boundary; for the last one also its change and whether the iteration moved no bit."""
        value = self.corrected(born)
        previous, self._latest[born.boundary] = self._latest.get(born.boundary), value
        if previous is None:
            return value, None, None
        iteration = born.iteration
        if self._watch_bits:
            moved = (value != previous).flatten(1).any(1)
            self._moved[iteration] = self._moved[iteration] | moved if iteration in self._moved else moved
        if born.boundary < self._last:
            return value, None, None
        change = (value - previous).abs().flatten(1).mean(1)
        return value, change, ~self._moved.pop(iteration) if self._watch_bits else None

    def keep(self, running: tuple[int, ...]) -> None:
        super().keep(running)
        _keep(self._latest, running)
        _keep(self._moved, running)


class _Lookback(_Corrected):
    """What a multistep fine step looks back at: the x0 of the step before it in its solve.

    The first step of a solve looks back across the boundary, at what the solve before left there. The coarse sweep has
    no such step: it interpolates between the x0 at its boundaries, along the log-SNR.
    """

    def __init__(self, noise: NoiseTable, program: Program) -> None:
        super().__init__()
        self._latest: dict[tuple[int, int], Tensor] = {}
        self._bounds = program.bounds
        log_snr = (noise.alpha / noise.sigma).log()
        self._way_back = [0.0]
        for before, start in zip(program.bounds[:-2], program.bounds[1:-1], strict=True):
            way = float((log_snr[start] - log_snr[start - 1]) / (log_snr[start] - log_snr[before]))
            self._way_back.append(way if math.isfinite(way) else 0.0)

    def before(self, row: Row, own: Tensor) -> Tensor:
        """x0 of the step before the row's; its own at the start of the grid, where the step does not look back."""
        if row.position == 0:
            return own
        value = self._latest.pop((row.iteration, row.block))
        if row.iteration == 0 and row.step == 0:
            return own + (value - own) * self._way_back[row.block]
        return value

    def after(self, rows: list[Row], x0: Tensor) -> None:
        """Remember the x0 of these fine rows."""
        for row, value in zip(rows, x0, strict=True):
            ends_block = row.position + 1 == self._bounds[row.block + 1]
            (self.solved if ends_block else self._latest)[row.iteration, row.block] = value

    def make(self, born: Boundary) -> None:
        """What the solve from a new boundary will look back at."""
        self._latest[born] = self.corrected(born)

    def keep(self, running: tuple[int, ...]) -> None:
        super().keep(running)
        _keep(self._latest, running)


class _History:
    """x0 predicted at each boundary, for the 2M jump from the next one; let go after its last reader."""

    def __init__(self, program: Program) -> None:
        self.x0: dict[Boundary, Tensor] = {}
        rows = (row for wave in program for row in wave.rows)
        self._readers = Counter(settled(row.iteration, row.block - 1) for row in rows if row.coarse and row.block > 0)

    def before(self, row: Row, own: Tensor) -> Tensor:
        """x0 at the boundary before the row's, as the row's iteration sees it; its own at the first boundary."""
        if row.block == 0:
            return own
        key = settled(row.iteration, row.block - 1)
        self._readers[key] -= 1
        return self.x0[key] if self._readers[key] else self.x0.pop(key)


def _tables(
    x: Tensor, noise: NoiseTable, program: Program, coarse_solver: CoarseSolver, draws: Tensor | None
) -> tuple[StepTable, StepTable, list[Tensor] | None]:
    """Coefficients of all fine and of all coarse rows, in program order: a wave uses a contiguous slice of each.

    Third, for stochastic schedulers: the noise that the fine steps of each block add up to, [batch, ...].
    """
    bounds = program.bounds
    step = [fine_step(noise, index) for index in range(noise.num_steps)]
    jump: list[Coefficients] = []
    jump_noise = None if draws is None else [torch.zeros_like(x)] * program.num_blocks
    for block in range(program.num_blocks):
        start, stop = bounds[block], bounds[block + 1]
        previous = bounds[block - 1] if block > 0 and coarse_solver == "2m" else None
        if noise.momentum is not None or noise.spread is not None:
            coefficients, weights = chained(noise, previous, start, stop)
            jump.append(coefficients)
            if jump_noise is not None and draws is not None:
                column = torch.tensor(weights, dtype=x.dtype, device=x.device)
                jump_noise[block] = torch.tensordot(column, draws[start:stop], dims=1)
        else:
            jump.append(second_order(noise, previous, start, stop))
    rows = [row for wave in program for row in wave.rows]
    solves = [row.position for row in rows if row.fine]
    jumps = [row.block for row in rows if row.coarse]
    fine = StepTable(noise, solves, [step[index] for index in solves], like=x)
    coarse = StepTable(noise, [bounds[block] for block in jumps], [jump[block] for block in jumps], like=x)
    return fine, coarse, jump_noise


def _keep(tensors: MutableMapping[Any, Tensor], running: tuple[int, ...]) -> None:
    """Drop the samples that have finished from every tensor [samples, ...] of the table."""
    for key, tensor in tensors.items():
        tensors[key] = tensor[list(running)]
