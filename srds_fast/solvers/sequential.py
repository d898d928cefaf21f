"""The sequential sampler, as a core: the reference every other method is measured against."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from ..noise import NoiseTable
from ..program import Program
from ..steps import ITS_X0, Like, StepTable, fine_step
from .core import NOTHING, Checkpoint, Core, Evaluate, Extras, output_of


def sequential(x: Tensor, noise: NoiseTable, program: Program, extras: Extras = NOTHING) -> Core:
    """N fine steps, one row a wave.

    Args:
        x: starting noise, [batch, ...]; its dtype is the dtype of the state.
        noise: table of N steps.
        program: `program.sequential(N)`.
        extras: noise of stochastic steps, constraint, trajectory, history.
    """
    steps, carries_x0 = _steps(noise, Like.of(x))
    samples = tuple(range(len(x)))
    trajectory, draws = extras.trajectory, extras.draws
    x0_prev = None if extras.x0_prev is None else extras.x0_prev.unsqueeze(0)
    x = x.unsqueeze(0)
    for position in range(noise.num_steps):
        m = output_of((yield Evaluate(x, (position,), samples, position)), x)
        x = steps.advance(position, x, m)
        if carries_x0:
            x, x0 = x.split(1)
            x = x + steps.d[position][:1] * (x0 if x0_prev is None else x0_prev)
            x0_prev = x0
        if draws is not None:
            x = x + steps.spread[position][:1] * draws[position]
        if extras.constrain is not None:
            x = extras.constrain(x[0], position + 1, samples).unsqueeze(0)
        if trajectory is not None:
            trajectory.record(position + 1, x[0], samples)
            if carries_x0:
                trajectory.record_x0(position, x0[0], samples)
    sample = x.squeeze(0)
    yield Checkpoint(0, sample, samples, change=None, exact=True)
    return sample


@lru_cache(maxsize=64)
def _steps(noise: NoiseTable, like: Like) -> tuple[StepTable, bool]:
    """The steps' coefficients, and whether they look back: each then has a second row, its x0."""
    grid = range(noise.num_steps)
    fine = [fine_step(noise, index) for index in grid]
    carries_x0 = any(step.d != 0.0 for step in fine)
    rows = 2 if carries_x0 else 1
    coefficients = [row for step in fine for row in (step, ITS_X0)[:rows]]
    positions = [index for index in grid for _ in range(rows)]
    return StepTable(noise, positions, coefficients, like, [rows] * noise.num_steps), carries_x0
