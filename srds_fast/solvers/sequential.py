"""The sequential sampler, as a core: the reference every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..schedulers.table import NoiseTable
from . import program as programs
from .contract import NO_INPUTS, Checkpoint, Core, SolverInputs
from .method import Method, Target
from .program import Program
from .waves import Waves


@dataclass(frozen=True)
class Sequential(Method):
    """The sequential sampler; it has no options."""

    name: ClassVar[str] = "sequential"
    about: ClassVar[str] = "one row per wave, in our loop"

    def most_iterations(self, target: Target) -> int:
        return 1

    def program(self, num_steps: int, max_iterations: int, *, max_rows: int | None, bitwise: bool) -> Program:
        return programs.sequential(num_steps)

    def core(self, x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs, *, bitwise: bool) -> Core:
        return sequential(x, noise, program, inputs)

    @property
    def fits_turns(self) -> bool:
        return True

    def num_checkpoints(self, max_iterations: int) -> int:
        return 1

    def reported(self) -> dict[str, Any]:
        return {}


def sequential(x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs = NO_INPUTS) -> Core:
    """N fine steps, one row a wave.

    Args:
        x: starting noise, [batch, ...]; its dtype is the dtype of the state.
        noise: table of N steps.
        program: `program.sequential(N)`.
        inputs: noise of stochastic steps, constraint, trajectory, history, the network's wishes.
    """
    waves = Waves(x, noise, program, "ddim", inputs)
    for number in range(noise.num_steps):
        completions = waves.update(number, (yield waves.evaluate(number)))
    sample = waves.value(completions[0])
    yield Checkpoint(0, sample, waves.samples, change=None, exact=True)
    return sample
