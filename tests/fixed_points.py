"""Forms of fixed-point methods, samplers, and how many sweeps these take."""

from __future__ import annotations

import math

import pytest
import torch
from cores import Denoiser, feed
from torch import Tensor

from srds_fast.sampling.rows import draw_noise
from srds_fast.schedulers.table import NoiseTable
from srds_fast.solvers.contract import NO_INPUTS, Checkpoint, Core, SolverInputs, Trajectory
from srds_fast.solvers.fixed_point import program as sweeps
from srds_fast.solvers.fixed_point.options import FixedPoint, ParaDiGMS, ParaTAA
from srds_fast.solvers.fixed_point.program import Sweeps

# all that a sweep does differently for some options
FORMS: dict[str, FixedPoint] = {
    "parataa": ParaTAA(),
    "parataa-order": ParaTAA(order=3, history=5, data_std=math.inf),
    "paradigms-tolerance": ParaDiGMS(window=5, tolerance=4e-3),
    "parataa-window": ParaTAA(window=7, step_tolerance=1e-3),
    "parataa-published": ParaTAA.published(window=6, order=4),
    "paradigms": ParaDiGMS(window=5, step_tolerance=0.1),
    "paradigms-whole": ParaDiGMS(window=None),
}


forms = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


def sweeps_of(num_steps: int, options: FixedPoint, iterations: int | None = None) -> Sweeps:
    """The program of a run; by default all points are rows, as in an exact run."""
    if options.window is not None:
        return sweeps.windows(num_steps, options.window)
    return sweeps.fixed_point(num_steps, iterations or num_steps)


def states(denoiser: Denoiser, x: Tensor, grid: NoiseTable, inputs: SolverInputs = NO_INPUTS) -> Tensor:
    """The sequential trajectory, [N + 1, ...]; step by step as the table defines them."""
    found, x0 = [x], None
    for index in range(grid.num_steps):
        z = None if inputs.draws is None else inputs.draws[index]
        x, x0 = grid.step(index, x, denoiser(x, grid.timesteps[index].expand(len(x))), x0, z)
        if inputs.constrain is not None:
            x = inputs.constrain(x, index + 1, tuple(range(len(x))))
        found.append(x)
    return torch.stack(found)


def inputs_of(x: Tensor, grid: NoiseTable) -> SolverInputs:
    draws = draw_noise(grid, x, x.dtype, torch.Generator().manual_seed(3))
    return SolverInputs(draws=draws, trajectory=Trajectory(grid.num_steps))


def waves_until(bound: float, core: Core, denoiser: Denoiser, grid: NoiseTable, expected: Tensor) -> int:
    """Sweeps until the mean absolute error of every sample is within a bound."""
    count = 0

    def keep(checkpoint: Checkpoint) -> tuple[int, ...] | None:
        nonlocal count
        count = checkpoint.iteration
        error = (checkpoint.sample - expected).abs().flatten(1).mean(1)
        return () if float(error.max()) <= bound else None

    feed(core, denoiser, grid, keep)
    return count
