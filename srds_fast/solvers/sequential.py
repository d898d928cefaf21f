"""The sequential sampler, as a core: the reference every other method is measured against."""

from __future__ import annotations

from torch import Tensor

from ..schedulers.table import NoiseTable
from .contract import NOTHING, Checkpoint, Core, Extras
from .program import Program
from .waves import Waves


def sequential(x: Tensor, noise: NoiseTable, program: Program, extras: Extras = NOTHING) -> Core:
    """N fine steps, one row a wave.

    Args:
        x: starting noise, [batch, ...]; its dtype is the dtype of the state.
        noise: table of N steps.
        program: `program.sequential(N)`.
        extras: noise of stochastic steps, constraint, trajectory, history, the network's wishes.
    """
    waves = Waves(x, noise, program, "ddim", extras)
    for number in range(noise.num_steps):
        births = waves.update(number, (yield waves.evaluate(number)))
    sample = waves.value(births[0])
    yield Checkpoint(0, sample, waves.samples, change=None, exact=True)
    return sample
