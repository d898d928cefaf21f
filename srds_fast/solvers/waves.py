"""A program as updates between network calls, and the memory they work on: what all cores of blocks share.

The maths is in the coefficients (`steps`), the order in the exchange of slots (`dataflow`), the arithmetic in one
launch per wave (`kernels.wave_update`). Here the three are put together.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels.common.layout import with_inner_layout
from ..kernels.wave_update import Buffers, wave_update
from ..schedulers.steps import CoarseSolver, TensorSpec
from ..schedulers.table import NoiseTable
from .contract import Answer, Evaluate, SolverInputs, output_of
from .dataflow import Completed, Exchange
from .program import Program
from .wave_table import _noises, _updates


class Waves:
    """The waves of one run, one after another: `evaluate` tells what the network is given, `update` takes its output.

    Args:
        x: starting noise, [batch, ...]; its dtype is the dtype of the state.
        noise: table of N steps.
        program: the waves.
        coarse_solver: of the jumps.
        inputs: noise of stochastic steps, constraint, trajectory, history, the network's wishes.
        watched: compare every boundary with the iteration before, bit by bit.

    Attributes:
        samples: which samples of the original batch still run, in order.
    """

    def __init__(
        self,
        x: Tensor,
        noise: NoiseTable,
        program: Program,
        coarse_solver: CoarseSolver,
        inputs: SolverInputs,
        *,
        watched: bool = False,
    ) -> None:
        self.samples = tuple(range(len(x)))
        self._program = program
        self._inputs = inputs
        self._updates = _updates(
            noise,
            program,
            coarse_solver,
            TensorSpec.of(x),
            given=inputs.x0_prev is not None,
            scaled=inputs.scaled,
            watched=watched,
            apart=inputs.constrain is not None,
        )
        noises = _noises(inputs.draws, self._updates.spreads, program)
        self._buffers = Buffers(self._updates.table, x, noises, channels_last=inputs.network.channels_last)
        if inputs.x0_prev is not None:
            self._buffers.slots[1].copy_(inputs.x0_prev)
        self._input = self._run(0)

    def evaluate(self, number: int) -> Evaluate:
        """Wave `number`, the next one."""
        assert self._input is not None, "a wave has rows"
        return Evaluate(self._input, self._program.positions[number], self.samples, number)

    def update(self, number: int, answer: Answer) -> tuple[Completed, ...]:
        """Take the output of wave `number`; returns the boundaries that came into being."""
        wave = self._updates.layout.waves[number]
        m = with_inner_layout(output_of(answer), self._buffers.memory)
        constrain = self._inputs.constrain
        if constrain is None:
            self._input = self._run(number + 1, m)
        else:
            self._run(2 * number + 1, m)
            slots = self._buffers.slots
            for output in wave.outputs:
                if output.kind in ("jump", "fine"):
                    slots[output.slot].copy_(constrain(slots[output.slot], output.arrives, self.samples))
            self._input = self._run(2 * number + 2)
        if self._inputs.trajectory is not None:
            self._record(wave)
        return wave.completions

    def value(self, completed: Completed) -> Tensor:
        """A boundary that has just come into being, [samples, ...]; a copy."""
        value: Tensor = self._buffers.slots[completed.state.slot].clone()
        return value

    def change(self, completed: Completed) -> Tensor | None:
        """[samples], mean absolute difference to the same boundary an iteration before; None if there is none."""
        return None if completed.compare is None else self._buffers.change[completed.boundary.iteration]

    def stationary(self, completed: Completed) -> Tensor | None:
        """[samples], no boundary moved by a bit in this iteration; None if they are not watched."""
        watched = self._updates.table.records_moved and completed.compare is not None
        return ~self._buffers.moved[completed.boundary.iteration] if watched else None

    def keep(self, running: tuple[int, ...]) -> None:
        """Go on with these positions of the samples only."""
        if len(running) < len(self.samples):
            self.samples = tuple(self.samples[position] for position in running)
            self._buffers.keep(running)
            if self._input is not None:
                self._input = self._input[:, list(running)]

    def _run(self, number: int, m: Tensor | None = None) -> Tensor | None:
        inputs, table = self._inputs, self._updates.table
        given: Tensor | None = wave_update(
            table, number, self._buffers, m, guidance=inputs.guidance, network=inputs.network
        )
        return given

    def _record(self, wave: Exchange) -> None:
        trajectory, slots, bounds = self._inputs.trajectory, self._buffers.slots, self._program.bounds
        assert trajectory is not None
        for output in wave.outputs:
            row = output.row
            if output.kind == "fine" and output.arrives < bounds[row.block + 1]:
                trajectory.record(output.arrives, slots[output.slot].clone(), self.samples)
            elif output.kind == "x0":
                trajectory.record_x0(row.position, slots[output.slot].clone(), self.samples)
        for completed in wave.completions:
            trajectory.record(bounds[completed.boundary.boundary], self.value(completed), self.samples)
