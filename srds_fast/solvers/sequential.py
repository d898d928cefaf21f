"""The sequential sampler, as a core: the reference every other method is measured against."""

from __future__ import annotations

from torch import Tensor

from ..noise import NoiseTable
from ..program import Program
from ..steps import StepTable, first_order
from .core import Checkpoint, Core, Evaluate, output_of


def sequential(x: Tensor, noise: NoiseTable, program: Program) -> Core:
    """N fine steps, one row a wave.

    Args:
        x: starting noise, [batch, ...]; its dtype is the dtype of the state.
        noise: table of N steps.
        program: `program.sequential(N)`.
    """
    grid = range(noise.num_steps)
    fine = StepTable(noise, grid, [first_order(noise, index, index + 1) for index in grid], like=x)
    samples = tuple(range(len(x)))
    x = x.unsqueeze(0)
    for wave in program:
        (row,) = wave.rows
        m = output_of((yield Evaluate(x, (row.position,), samples)), x)
        x = fine.advance(slice(row.position, row.position + 1), x, m)
    sample = x.squeeze(0)
    yield Checkpoint(0, sample, samples, change=None, exact=True)
    return sample
