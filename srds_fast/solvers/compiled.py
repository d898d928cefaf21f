"""What a program is compiled to: the updates of its waves, and what these leave in which slots of the memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.wave_update import WaveTable
from ..schedulers.steps import TensorSpec
from .ahead import Told
from .contract import SolverInputs


class Form(NamedTuple):
    """What the updates of a run depend on, beside its program and its noise table."""

    spec: TensorSpec  # of the states
    history: bool = False  # what is carried beside the state is given with the starting noise
    scaled: bool = False  # the network's input is multiplied with the scheduler's input scale
    constrained: bool = False  # states are constrained after the steps of a wave, before its corrections
    bitwise: bool = False  # compare every boundary with the iteration before, not only the last one

    @classmethod
    def of(cls, x: Tensor, inputs: SolverInputs, bitwise: bool = False) -> Form:
        history, constrained = inputs.carried is not None, inputs.constrain is not None
        return cls(TensorSpec.of(x), history, inputs.scaled, constrained, bitwise)


class Completed(NamedTuple):
    """A boundary as an iteration leaves it; its last one is a whole sample.

    change: entry of its change since the iteration before; None: it is not measured.
    told: see `ahead.Told`.
    """

    iteration: int
    slot: int
    change: int | None
    told: Told | None = None


@dataclass
class CompiledWave:
    """What a wave leaves in the memory, as (grid position, slot); while it is compiled, numbers of values for slots."""

    # what steps and jumps have made, before corrections, if it is to be constrained
    arrivals: list[tuple[int, int]] = field(default_factory=list)
    # for the trajectory: states after corrections, and what multistep schedulers carry beside them
    states: list[tuple[int, int]] = field(default_factory=list)
    carried: list[tuple[int, list[int]]] = field(default_factory=list)
    completed: list[Completed] = field(default_factory=list)  # whole samples


@dataclass(frozen=True)
class CompiledProgram:
    """A program, or a stage of a long one."""

    waves: tuple[CompiledWave, ...]
    # The first update brings the starting noise to the network; that of a later stage does nothing. Then one for each
    # wave, two if states are constrained.
    table: WaveTable
    # first step, last step + 1, and weights [steps] of the noise that a jump adds up
    jump_noises: list[tuple[int, int, Tensor]]
    history: int  # slots, from 1 on, that hold what is given with the starting noise

    def noises(self, draws: Tensor | None) -> Tensor | None:
        """The noise of every step, and behind it that of the jumps, [steps + jumps, batch, ...]."""
        if draws is None or not self.jump_noises:
            return draws
        sums = [torch.tensordot(weights, draws[start:stop], dims=1)[None] for start, stop, weights in self.jump_noises]
        return torch.cat([draws, *sums])
