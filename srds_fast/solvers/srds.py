"""SRDS, Self-Refining Diffusion Samplers (Selvam, Merchant, Ermon, NeurIPS 2024): Parareal in time.

    x_{i+1}^p = F(x_i^{p-1}) + ( G(x_i^p) - G(x_i^{p-1}) )

F are the fine steps of a block, G one jump across it. The bracket is computed first: it is bitwise zero once its two
terms agree, and F's result is then returned untouched. Boundary i is the sequential one from iteration i on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedulers.steps import CoarseSolver
from ..schedulers.table import NoiseTable
from .contract import NOTHING, Checkpoint, Core, Extras, samples_of
from .program import Program
from .waves import Waves


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
        extras: noise of stochastic steps, constraint, trajectory, the network's wishes.
        watch_bits: fill `Checkpoint.still`.
    """
    waves = Waves(x, noise, program, coarse_solver, extras, watched=watch_bits)
    result = torch.empty_like(x)
    for number in range(len(program)):
        for birth in waves.update(number, (yield waves.evaluate(number))):
            iteration, boundary = birth.boundary
            if boundary < program.num_blocks:
                continue
            value, samples = waves.value(birth), waves.samples
            exact = iteration == program.num_blocks
            found = Checkpoint(iteration, value, samples, waves.change(birth), exact, waves.still(birth))
            running = samples_of((yield found), samples)
            if len(samples) == len(result):
                result.copy_(value)
            else:
                result[list(samples)] = value
            if iteration == program.num_iterations or not running:
                return result
            waves.keep(running)
    raise AssertionError("a program ends with a checkpoint")
