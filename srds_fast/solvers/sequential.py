"""The sequential sampler, as a core: the reference every other method is measured against."""

from __future__ import annotations

from torch import Tensor

from ..noise import NoiseTable
from ..program import Program
from ..steps import StepTable, fine_step
from .core import NOTHING, Checkpoint, Core, Evaluate, Extras, output_of


def sequential(x: Tensor, noise: NoiseTable, program: Program, extras: Extras = NOTHING) -> Core:
    """N fine steps, one row a wave.

    Args:
        x: starting noise, [batch, ...]; its dtype is the dtype of the state.
        noise: table of N steps.
        program: `program.sequential(N)`.
        extras: noise of stochastic steps, constraint, trajectory, history.
    """
    grid = range(noise.num_steps)
    fine = StepTable(noise, grid, [fine_step(noise, index) for index in grid], like=x)
    samples = tuple(range(len(x)))
    trajectory = extras.trajectory
    x0 = x0_prev = None if extras.x0_prev is None else extras.x0_prev.unsqueeze(0)
    x = x.unsqueeze(0)
    for wave in program:
        (row,) = wave.rows
        position = row.position
        m = output_of((yield Evaluate(x, (position,), samples)), x)
        here = slice(position, position + 1)
        if fine.uses_history:
            x0 = fine.predict_x0(here, x, m)
            x0_prev = x0 if x0_prev is None else x0_prev
        z = None if extras.draws is None else extras.draws[here]
        x = fine.advance(here, x, m, x0, x0_prev, z)
        x0_prev = x0
        if extras.constrain is not None:
            x = extras.constrain(x[0], position + 1, samples).unsqueeze(0)
        if trajectory is not None:
            trajectory.record(position + 1, x[0], samples)
            if x0 is not None:
                trajectory.record_x0(position, x0[0], samples)
    sample = x.squeeze(0)
    yield Checkpoint(0, sample, samples, change=None, exact=True)
    return sample
