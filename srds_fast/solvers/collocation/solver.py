"""The solver core of collocation: secant sweeps, with a whole sample after each."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.common.network_input import network_input
from ...kernels.secant_sweep import Memory, SecantTable, SweepResult, predict_x0, secant_sweep
from ...schedulers.table import NoiseTable
from ..contract import NO_INPUTS, Checkpoint, Core, Evaluate, Parts, SolverInputs, merged, samples_of
from ..fixed_point.program import Sweeps


def collocation(
    x: Tensor,
    noise: NoiseTable,
    program: Sweeps,
    table: SecantTable,
    inputs: SolverInputs = NO_INPUTS,
    *,
    bitwise: bool = False,
) -> Core:
    """Secant sweeps over the grid with a whole sample after each.

    `Checkpoint.change` is that of the point that moved most, `Checkpoint.doubt` the expected error of what was
    interpolated since the network was last asked at a point: where a sample moves far after the cover was visited, no
    change shows it.

    Args:
        x: starting noise, [batch, ...], in the dtype of the state.
        program: of `nodes.secant_sweeps`; its waves may be cut.
        table: of the program.
        bitwise: fill `Checkpoint.stationary`.
    """
    points, parts = Points(x, noise, table, inputs), Parts()
    result = x
    for number, wave in enumerate(program):
        ends = bool(wave.boundaries)  # else it is a part of a wave that was too wide
        parts.take((yield points.evaluate(number, program.positions[number])), last=ends)
        if not ends:
            continue
        found = points.sweep(number, parts.joined(inputs.branches), bitwise=bitwise)
        iteration, samples = wave.boundaries[0].iteration, points.samples
        exact = iteration == program.exact_iteration
        checkpoint = Checkpoint(iteration, found.sample, samples, found.change, exact, found.stationary, found.doubt)
        running = samples_of((yield checkpoint), samples)
        result = merged(result, found.sample, samples)
        if number + 1 == len(program) or not running:
            return result
        points.keep(running)
    raise AssertionError("a program ends with a checkpoint")


class Points:
    """The points of the grid, and what is known of each.

    Attributes:
        samples: which samples of the original batch still run, in order.
    """

    def __init__(self, x: Tensor, noise: NoiseTable, table: SecantTable, inputs: SolverInputs) -> None:
        self.samples = tuple(range(len(x)))
        self._noise, self._table, self._inputs = noise, table, inputs
        self._entering: Tensor | None = None
        memory = self._memory = Memory(table, x.contiguous(), inputs.draws, inputs.carried)
        points = memory.states(0)
        if inputs.initial_guess is None:
            torch.mul(table.growth, x, out=points)
            torch.mul(table.response, memory.points(0)[:-1], out=memory.expected)
            return
        guess = inputs.initial_guess.to(x)
        torch.cat([x[None], guess[1:]], out=points)
        if table.clip is None and table.momentum is None and table.look_back is None:
            # the outputs that lead from each point of the guess to the next, and from its own starting noise on
            flat = guess.flatten(2)
            led = flat[1:] - table.a * flat[:-1]
            if table.spread is not None and memory.draws is not None:
                led = led - table.spread * memory.draws
            torch.div(led, table.b, out=memory.output(1))
            memory.expected[0] = table.response[0] * (memory.points(0)[0] - flat[0])
        else:
            torch.mul(table.response, memory.points(0)[:-1], out=memory.expected)

    def evaluate(self, number: int, positions: tuple[int, ...]) -> Evaluate:
        """Wave `number`."""
        given, self._entering = self._entering, None
        if given is None:  # no sweep has made it: the first one, a part of a wave, or samples have left
            table = self._table
            given = network_input(self._memory.states(0), table.rows[number], table.input_scale, self._inputs.network)
        return Evaluate(given, positions, self.samples, number)

    def sweep(self, number: int, m: Tensor, *, bitwise: bool) -> SweepResult:
        """Move all points, by the network's output at all rows of a wave; number: of its last part."""
        inputs = self._inputs
        found = secant_sweep(
            self._table,
            number,
            self._memory,
            m,
            guidance=inputs.guidance,
            network=inputs.network,
            constrain=None if inputs.constrain is None else self._constrain,
            check_stationary=bitwise,
        )
        if inputs.trajectory is not None:
            self._record(self._table.waves[number].first)
        self._entering = found.next_input
        return found

    def keep(self, running: tuple[int, ...]) -> None:
        """Go on with these positions of the samples only."""
        if len(running) < len(self.samples):
            self.samples = tuple(self.samples[position] for position in running)
            self._memory.keep(torch.tensor(running, device=self._memory.expected.device))
            self._entering = None

    def _constrain(self, states: Tensor, position: int) -> Tensor:
        assert self._inputs.constrain is not None
        return self._inputs.constrain(states.unflatten(1, self._memory.shape), position, self.samples).flatten(1)

    def _record(self, first: int) -> None:
        """Tell the trajectory what the sweep has made, and the x0 that it was made from."""
        trajectory, memory = self._inputs.trajectory, self._memory
        assert trajectory is not None
        states = memory.states(0).clone()  # the memory is written again
        steps, carried = range(first, self._table.num_steps), None
        if self._noise.memory is not None:
            carried = self._noise.memory.carried_by(memory.points(1), memory.output(1), memory.draws, memory.carried)
        for step in steps:
            trajectory.record(step + 1, states[step + 1], self.samples)
            found = predict_x0(self._table, memory, step, age=1)[None] if carried is None else carried[step]
            trajectory.record_carried(step + 1, found.unflatten(2, memory.shape), self.samples)
