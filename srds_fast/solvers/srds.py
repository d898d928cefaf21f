"""SRDS, Self-Refining Diffusion Samplers (Selvam, Merchant, Ermon, NeurIPS 2024): Parareal in time.

    x_{i+1}^p = F(x_i^{p-1}) + ( G(x_i^p) - G(x_i^{p-1}) )

F are the fine steps of a block, G one jump across it. The bracket is computed first: it is bitwise zero once its two
terms agree, and F's result is then returned untouched. Boundary i is the sequential one from iteration i on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..noise import NoiseTable
from ..program import Boundary, Program, Row, settled
from ..steps import CoarseSolver, Coefficients, StepTable, first_order, second_order
from .core import Checkpoint, Core, Evaluate, output_of, samples_of


def srds(
    x: Tensor, noise: NoiseTable, program: Program, coarse_solver: CoarseSolver = "2m", *, watch_bits: bool = False
) -> Core:
    """Run an SRDS program.

    Args:
        x: starting noise, [batch, ...]; its dtype is the dtype of the state.
        noise: table of N steps.
        program: `program.srds(N, ...)`.
        coarse_solver: "ddim" (first order) or "2m" (DPM-Solver++(2M), reuses the output at the boundary before).
        watch_bits: fill `Checkpoint.still`.
    """
    fine, coarse = _tables(x, noise, program, coarse_solver)
    boundaries = _Boundaries(x, program, watch_bits)
    points = {(0, 0): x}  # where each solve (iteration, block) stands, until it is evaluated
    history = _History(program)
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
            if coarse.uses_history:
                x0 = coarse.predict_x0(these, x_jump, m_jump)
                x0_prev = torch.stack([history.before(row, own) for row, own in zip(jumps, x0, strict=True)])
                history.x0.update(zip((Boundary(row.iteration, row.block) for row in jumps), x0, strict=True))
            landed = coarse.advance(these, x_jump, m_jump, x0, x0_prev)
            boundaries.jumped.update(zip(((row.iteration, row.block) for row in jumps), landed, strict=True))
        if solves:
            these = slice(fine_done, fine_done := fine_done + len(solves))
            stepped = fine.advance(these, here[-len(solves) :], m[-len(solves) :])
            for row, value in zip(solves, stepped, strict=True):
                ends_block = row.position + 1 == program.bounds[row.block + 1]
                (boundaries.solved if ends_block else points)[row.iteration, row.block] = value

        for born in wave.boundaries:
            sample, change, still = boundaries.make(born)
            if born.boundary < program.num_blocks:
                points[born] = sample
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
    raise AssertionError("a program ends with a checkpoint")


class _Boundaries:
    """Makes the boundaries from finished solves and jumps, and measures how far they moved."""

    def __init__(self, x: Tensor, program: Program, watch_bits: bool) -> None:
        self.solved: dict[tuple[int, int], Tensor] = {}
        self.jumped: dict[tuple[int, int], Tensor] = {}
        self._latest: dict[int, Tensor] = {}
        self._moved: dict[int, Tensor] = {}
        self._watch_bits = watch_bits
        self._last = program.num_blocks

    def make(self, born: Boundary) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Value of a boundary; for the last one also its change and whether the iteration moved no bit."""
        iteration, block = born.iteration, born.boundary - 1
        if iteration == 0:
            self._latest[born.boundary] = self.jumped[0, block]
            return self.jumped[0, block], None, None
        value = self.solved.pop((iteration - 1, block))
        before = self.jumped.pop((iteration - 1, block))
        if iteration <= block:
            value = value + (self.jumped[iteration, block] - before)
        previous, self._latest[born.boundary] = self._latest[born.boundary], value
        if self._watch_bits:
            moved = (value != previous).flatten(1).any(1)
            self._moved[iteration] = self._moved[iteration] | moved if iteration in self._moved else moved
        if born.boundary < self._last:
            return value, None, None
        change = (value - previous).abs().flatten(1).mean(1)
        return value, change, ~self._moved.pop(iteration) if self._watch_bits else None

    def keep(self, running: tuple[int, ...]) -> None:
        """Go on with these positions of the samples only."""
        _keep(self.solved, running)
        _keep(self.jumped, running)
        _keep(self._latest, running)
        _keep(self._moved, running)


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


def _tables(x: Tensor, noise: NoiseTable, program: Program, coarse_solver: CoarseSolver) -> tuple[StepTable, StepTable]:
    """Coefficients of all fine and of all coarse rows, in program order: a wave uses a contiguous slice of each."""
    bounds = program.bounds
    step = [first_order(noise, index, index + 1) for index in range(noise.num_steps)]
    jump: list[Coefficients] = []
    for block in range(program.num_blocks):
        if coarse_solver == "2m":
            previous = bounds[block - 1] if block > 0 else None
            jump.append(second_order(noise, previous, bounds[block], bounds[block + 1]))
        else:
            jump.append(first_order(noise, bounds[block], bounds[block + 1]))
    rows = [row for wave in program for row in wave.rows]
    solves = [row.position for row in rows if row.fine]
    jumps = [row.block for row in rows if row.coarse]
    fine = StepTable(noise, solves, [step[index] for index in solves], like=x)
    coarse = StepTable(noise, [bounds[block] for block in jumps], [jump[block] for block in jumps], like=x)
    return fine, coarse


def _keep(tensors: MutableMapping[Any, Tensor], running: tuple[int, ...]) -> None:
    """Drop the samples that have finished from every tensor [samples, ...] of the table."""
    for key, tensor in tensors.items():
        tensors[key] = tensor[list(running)]
