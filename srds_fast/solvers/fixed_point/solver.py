"""Fixed-point methods: every point of the grid is refined in every wave. ParaTAA, ParaDiGMS.

    x_{i+1}^new = f_i(x_i^old) + c_i (x_i^new - x_i^old)

f_i is the scheduler's step, c_i how it responds to the state it departs from (`grid.responses`). Triangular Anderson
acceleration (Tang et al. 2024) mixes the iterates. A point is made of points before it alone, and the first one that is
not exact of an exact one and of what the network says there: so in every wave one more becomes exact, at least.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.common.network_input import guided, network_input
from ...kernels.fixed_point_wave import Memory, SweepResult, fixed_point_wave
from ...kernels.fixed_point_wave.operations import additions, mixed, predict_x0
from ...schedulers.steps import TensorSpec
from ...schedulers.table import NoiseTable
from ..contract import NO_INPUTS, Checkpoint, Core, Evaluate, Parts, SolverInputs, merged, samples_of
from ..sliding import (
    Array,
    CarriedError,
    effect_of_errors,
    effect_of_movements,
    expected_responses,
    num_within,
    posterior_std,
    rms,
    shared_bounds,
)
from .grid import data_std_of, grid_of, responses
from .parameters import Parameters
from .program import Sweeps


def fixed_point(
    x: Tensor,
    noise: NoiseTable,
    program: Sweeps,
    options: Parameters,
    inputs: SolverInputs = NO_INPUTS,
    *,
    bitwise: bool = False,
) -> Core:
    """A whole sample after each sweep; with a window, one at the end. bitwise: a window tolerates nothing."""
    if options.window is not None:
        return (yield from _sliding(x, noise, program, options, inputs, bitwise))
    points = Points(x, noise, program, options, inputs)
    result = x
    for number, wave in enumerate(program):
        ends = bool(wave.boundaries)  # else it is a part of a wave that was too wide
        points.parts.take((yield points.evaluate(number)), last=ends)
        if not ends:
            continue
        sample, change, stationary, _ = points.refine(bitwise)
        points.record()
        iteration, samples = wave.boundaries[0].iteration, points.samples
        exact = iteration == program.exact_iteration
        running = samples_of((yield Checkpoint(iteration, sample, samples, change, exact, stationary)), samples)
        result = merged(result, sample, samples)
        if number + 1 == len(program) or not running:
            return result
        points.keep(running)
    raise AssertionError("a program ends with a checkpoint")


def _sliding(
    x: Tensor, noise: NoiseTable, program: Sweeps, options: Parameters, inputs: SolverInputs, bitwise: bool
) -> Core:
    """The window begins at the first step that is not finished: the host waits for its errors after every wave."""
    points, num_steps = Window(x, noise, program, options, inputs), program.num_steps
    bound: list[float] = _bounds(noise, options, bitwise=bitwise).tolist()
    first = sweeps = 0
    while first < num_steps:
        sweeps += 1
        points.parts.take((yield points.evaluate(first)), last=True)
        found = points.sweep()
        residual = found.residual
        error = found.movement if residual is None or not options.slides_by_residuals else residual
        last = first + len(error)
        finished = num_within(error, bound[first:last])
        if residual is None:
            # a point that moved too far was still made of steps that had finished
            passed = min(last - first, finished + 1)
            points.carried.slide(found.departed[:passed])
        else:
            # errors are those of the points before the sweep, which may have made some of them larger
            points.put_back(first, finished)
            # a residual belongs to its own step; the point behind the first row is exact if it is not put back
            passed = max(1, finished)
            residual = residual[:passed] if finished else np.zeros_like(residual[:1])
            points.carried.slide(found.departed[:passed], residual)
        points.record()
        first += passed
        if first < num_steps:
            points.enter(last, program.positions[first][-1] + 1)
    sample: Tensor = points.memory.x[-1].clone()
    yield Checkpoint(sweeps, sample, points.samples, None, exact=False, error=points.carried.bound)
    return sample


def _bounds(noise: NoiseTable, options: Parameters, *, bitwise: bool) -> Tensor:
    """Of the error of each step, by which the window slides; [N] float64."""
    everywhere = tuple(range(noise.num_steps + 1))
    if bitwise:
        return torch.zeros(noise.num_steps, dtype=torch.float64, device="cpu")
    if options.step_tolerance is None:
        assert options.tolerance is not None, "with_defaults fills it in"
        response, (_, assumed) = expected_responses(noise, everywhere), responses(noise, data_std_of(noise, options))
        by_residuals = options.slides_by_residuals
        effect = effect_of_errors(response) if by_residuals else effect_of_movements(response, assumed)
        return shared_bounds(effect, options.tolerance)
    deviation = posterior_std(noise, everywhere)
    if options.slides_by_residuals:
        return options.step_tolerance * deviation.clamp(min=1.0)
    # ParaDiGMS compares a point with the step that departs from it
    return options.step_tolerance * torch.cat([deviation[1:], deviation.new_zeros(1)])


class Points:
    """The points of the grid, and what is known of each. `samples` of the original batch still run.

    Attributes:
        parts: what the network has returned since the last sweep; the next one uses all of it.
    """

    def __init__(
        self, x: Tensor, noise: NoiseTable, program: Sweeps, options: Parameters, inputs: SolverInputs
    ) -> None:
        self.samples = tuple(range(len(x)))
        table, growth = grid_of(noise, program, options, TensorSpec.of(x), scaled=inputs.scaled)
        self._noise, self._table, self._growth = noise, table, growth
        self._program, self._options, self._inputs = program, options, inputs
        self._number = 0
        self.parts = Parts()
        self._entering: Tensor | None = None
        memory = self.memory = Memory(table, x, inputs.draws, inputs.carried)
        if inputs.initial_guess is None:
            torch.mul(growth, x, out=memory.x)
            return
        # from its own starting noise on
        torch.cat([x[None], inputs.initial_guess[1:].to(x)], out=memory.x)

    def evaluate(self, number: int) -> Evaluate:
        self._number = number
        given, self._entering = self._entering, None
        if given is None:  # no sweep has made it: the first one, a part of a wave, or samples have left
            table = self._table
            given = network_input(self.memory.x, table.rows[number], table.input_scale, self._inputs.network)
        return Evaluate(given, self._program.positions[number], self.samples, number)

    def refine(self, bitwise: bool) -> SweepResult:
        """Move the points behind the first row, to the end of the grid."""
        inputs = self._inputs
        found = fixed_point_wave(
            self._table,
            self._number,
            self.memory,
            self.parts.joined(inputs.branches),
            guidance=inputs.guidance,
            network=inputs.network,
            constrain=None if inputs.constrain is None else self._constrained,
            check_stationary=bitwise,
        )
        self._entering = found.next_input
        return found

    def record(self) -> None:
        """Tell the trajectory what the wave evaluated last has come to."""
        trajectory, table, memory = self._inputs.trajectory, self._table, self.memory
        if trajectory is None:
            return
        states = memory.x.clone()  # the memory is written again
        wave = table.sweeps[self._number]
        steps = range(wave.first, wave.last + 1)
        for step in steps:
            trajectory.record(step + 1, states[step + 1], self.samples)
        if self._noise.memory is not None:
            carried = self._noise.memory.carried_by(memory.before, memory.m[: steps.stop], memory.draws, memory.carried)
            for step in steps:
                trajectory.record_carried(step + 1, carried[step], self.samples)
            return
        for step in steps:
            x0 = predict_x0(table, memory.before, memory.m, step, step + 1)
            trajectory.record_carried(step + 1, x0, self.samples)

    def keep(self, running: tuple[int, ...]) -> None:
        """Go on with these positions of the samples only."""
        if len(running) < len(self.samples):
            self.samples = tuple(self.samples[position] for position in running)
            self.memory.keep(torch.tensor(running, device=self.memory.x.device))
            self._entering = None

    def _constrained(self, points: Tensor, first: int) -> Tensor:
        return self._inputs.constrained(points, range(first, first + len(points)), self.samples)


class Swept(NamedTuple):
    """What a sweep over a window found; root mean squares, [steps, samples].

    Attributes:
        residual: of each step, at the points before the sweep; None: not asked for.
        movement: of the point behind it.
        departed: of the point where it departs; 0 for the first.
    """

    residual: Array | None
    movement: Array
    departed: Array


class Window(Points):
    """Points of which a window is moved at a time, in plain PyTorch: the host waits for the errors after every wave.

    Attributes:
        carried: the error of the point where the window begins.
    """

    def __init__(
        self, x: Tensor, noise: NoiseTable, program: Sweeps, options: Parameters, inputs: SolverInputs
    ) -> None:
        super().__init__(x, noise, program, options, inputs)
        _, assumed = responses(noise, data_std_of(noise, options))
        self.carried = CarriedError(noise, tuple(range(noise.num_steps + 1)), assumed, x)
        self._firsts: list[int] = []  # the step that each sweep so far began with
        # A mixed point is not the step from the one before it: the window slides to the first that moved, not past it.
        self._steps_alone = not options.slides_by_residuals and options.history == 0
        self._guess_grows = bool((self._growth != 1).any())

    def sweep(self) -> Swept:
        """Move the points behind the first row."""
        table, memory, inputs = self._table, self.memory, self._inputs
        wave = table.sweeps[self._number]
        first, last = wave.first, wave.last + 1
        x, m = memory.x, memory.m[first:last]
        y, behind = x[first : last + 1], x[first + 1 : last + 1]
        m.copy_(guided(self.parts.joined(inputs.branches), inputs.guidance, m.dtype))
        stepped = table.scan.stepped(y, m, first, additions(table, memory, first, last))
        points = self._constrained(table.scan.corrected(stepped.clone(), y, first), first + 1)
        stepped = self._constrained(stepped, first + 1)
        asked = [points - behind] if self._steps_alone else [points - behind, stepped - behind]
        movement, *residual = rms(asked)
        self.carried.see(first, x[first:last], stepped)
        if table.history:
            # an affine combination of points that are constrained is, too
            points = mixed(table, memory, points, first, last)
        self._write(points, first, last)
        departed = np.concatenate([np.zeros_like(movement[:1]), movement[:-1]])
        return Swept(residual[0] if residual else None, movement, departed)

    def _write(self, points: Tensor, first: int, last: int) -> None:
        """Make the iterate that is being written the newest one, with these points behind `first`."""
        memory, x, after, changed = self.memory, self.memory.x, self.memory.after, 0
        if len(self._firsts) < len(memory.iterates):
            after.copy_(x)
        else:  # it has been written before: points up to the first of that sweep are as they were
            changed = self._firsts[-len(memory.iterates)] + 1
        torch.cat([x[changed : first + 1], points], out=after[changed : last + 1])
        self._firsts.append(first)
        memory.advance(last)

    def put_back(self, first: int, count: int) -> None:
        """So many points behind `first` as they were before the sweep."""
        window = slice(first + 1, first + 1 + count)
        self.memory.x[window] = self.memory.before[window]

    def enter(self, last: int, stop: int) -> None:
        """Points behind `last` up to `stop` enter the window; without an initial guess, where the first guess leads."""
        if stop > last and self._inputs.initial_guess is None:
            growth, x = self._growth, self.memory.x
            here = x[last]
            if self._guess_grows:
                here = growth[last + 1 : stop + 1] / growth[last] * here
            x[last + 1 : stop + 1] = here
