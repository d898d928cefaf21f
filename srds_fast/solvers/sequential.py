"""The sequential sampler, as a core: the reference every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from ..schedulers.table import NoiseTable
from . import program as programs
from .compiled import Form
from .contract import NO_INPUTS, Core, SolverInputs
from .method import Method, Target
from .program import Program
from .wave_table import compiled
from .waves import Waves


@dataclass(frozen=True)
class Sequential(Method):
    """The sequential sampler; it has no options."""

    name: ClassVar[str] = "sequential"
    about: ClassVar[str] = "one row per wave, in our loop"

    @property
    def shows_iterations(self) -> bool:
        return False

    def most_iterations(self, target: Target) -> int:
        return 1

    def program(self, num_steps: int, max_iterations: int, *, max_rows: int | None, bitwise: bool) -> Program:
        return programs.sequential(num_steps)

    def core(self, x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs, *, bitwise: bool) -> Core:
        return sequential(x, noise, program, inputs)

    def num_checkpoints(self, max_iterations: int) -> int:
        return 1

    def reported(self) -> dict[str, Any]:
        return {}


def sequential(x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs = NO_INPUTS) -> Core:
    """N fine steps, one row a wave."""
    updates = compiled(noise, program, "ddim", Form.of(x, inputs))
    waves = Waves(x, program, updates, inputs)
    for number in range(noise.num_steps):
        waves.advance(number, (yield waves.evaluate(number)))
    (completed,) = updates.waves[-1].completed
    found = replace(waves.checkpoint(completed), iteration=0)
    yield found
    return found.sample
