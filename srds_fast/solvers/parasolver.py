"""ParaSolver (Lu, Zhu, Hou, ICLR 2025): a coarse start, then sub-intervals that are refined in a sliding window.

    x_{j+1}^new = F_j(x_j) + ( x_j^new - x_j )

x_j are the states where sub-intervals begin, F_j the fine steps across sub-interval j. All sub-intervals of the window
are solved at the same time, each one step after another. The update is a Newton step with the identity as the Jacobian
of F. The first state of the window is exact if nothing is tolerated, so each iteration makes one more exact.

First the network is asked at the beginnings of the first few sub-intervals, one after another. The states behind them
follow from the x0 predicted last, held constant. A state that enters the window later follows in the same way from the
x0 predicted at the end of the window. A state is finished if it moved little enough: by default the bounds follow from
the tolerance of the call (`sliding.shared_bounds`). With step_tolerance, as in the authors' code, the mean square of
its movement must be within step_tolerance^2 times the variance of DDPM's posterior from there to the next state, which
says little of the sample.

Choices that the paper leaves open, or that differ from the authors' code:
- If a sub-interval is one step, the coarse start is exact, and the window begins behind it. The authors' window begins
  at step 0 and evaluates these rows again.
- At least one sub-interval is left to the window, however many coarse steps are asked for.
- x0 held constant means the scheduler's own steps with that x0, clipping and noise included (`steps.chained`).
- Multistep schedulers: the x0 to look back at, or all that is carried, belongs to the state, and gets the same update.
- Noise is drawn once for each fine step, as the sequential sampler draws it, so the limit is that sampler.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ..caches import cached
from ..errors import InvalidArgument
from ..kernels.common.clamping import clamped
from ..kernels.common.network_input import as_input, guided
from ..schedulers.memory import Memory
from ..schedulers.steps import TensorSpec, chained, fine_step, guessed_history
from ..schedulers.table import NoiseTable
from ..words import counted
from .checks import check_positive, check_whole
from .contract import Answer, Checkpoint, Core, Evaluate, SolverInputs, output_of
from .method import Method, Target
from .program import Boundary, Program, Row, Wave, block_bounds
from .sliding import (
    Array,
    CarriedError,
    effect_of_movements,
    expected_responses,
    num_within,
    posterior_std,
    rms,
    shared_bounds,
)


@dataclass(frozen=True)
class ParaSolver(Method):
    """ParaSolver (Lu et al., ICLR 2025): a coarse start, then sub-intervals that are refined in a sliding window.

    Attributes:
        num_coarse: sub-intervals that the coarse start crosses, one network call each.
        window: sub-intervals that are refined at a time.
        step_tolerance: bound on the movement of a state, in standard deviations of DDPM's posterior; the window slides
            over states within it. None: bounds that keep the sample within `tolerance`.
        tolerance: bound on the mean absolute error of a sample. None: the tolerance of the call.
        num_intervals: sub-intervals the steps are cut into. None: one for each step, as in the authors' experiments.
    """

    name: ClassVar[str] = "parasolver"
    about: ClassVar[str] = "five steps, then Picard iteration on a sliding window of 10"
    first_iteration: ClassVar[int] = 1
    num_coarse: int = 5
    window: int = 10
    step_tolerance: float | None = None
    tolerance: float | None = None
    num_intervals: int | None = None

    def __post_init__(self) -> None:
        check_whole("num_coarse", self.num_coarse, 1)
        check_whole("window", self.window, 1)
        check_whole("num_intervals", self.num_intervals, 1, optional=True)
        check_positive("step_tolerance", self.step_tolerance, optional=True)
        check_positive("tolerance", self.tolerance, optional=True)

    @classmethod
    def published(cls, window: int = 10, step_tolerance: float = 0.05) -> ParaSolver:
        """The authors' form, with the defaults of their command line."""
        return cls(window=window, step_tolerance=step_tolerance)

    def with_defaults(self, target: Target) -> Self:
        if (self.num_intervals or 0) > target.num_steps:
            raise InvalidArgument(
                f"num_intervals is {self.num_intervals} for {counted(target.num_steps, 'step')}. A sub-interval holds "
                f"at least one step. Pass at most {target.num_steps}, or leave it out."
            )
        given = self.step_tolerance is not None or self.tolerance is not None
        # nothing is tolerated in bitwise runs
        return self if given or target.bitwise else replace(self, tolerance=target.tolerance)

    def most_iterations(self, target: Target) -> int:
        return self.num_intervals or target.num_steps

    def program(self, num_steps: int, max_iterations: int, *, max_rows: int | None, bitwise: bool) -> Program:
        window = min(self.window, max_rows or self.window)
        return intervals(num_steps, self.num_intervals or num_steps, self.num_coarse, window)

    def rows(self, num_steps: int, max_iterations: int) -> int:
        return num_steps * min(self.window, num_steps) + self.num_coarse

    def core(self, x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs, *, bitwise: bool) -> Core:
        assert isinstance(program, Intervals)
        return parasolver(x, noise, program, self._bounds(noise, program, bitwise=bitwise), inputs)

    def _bounds(self, noise: NoiseTable, program: Intervals, *, bitwise: bool) -> Tensor:
        """Of the movement of the state behind each sub-interval, by which the window slides; [B] float64."""
        if bitwise:
            return torch.zeros(program.num_blocks, dtype=torch.float64, device="cpu")
        if self.step_tolerance is None:
            assert self.tolerance is not None, "with_defaults fills it in"
            response = expected_responses(noise, program.bounds)
            return shared_bounds(effect_of_movements(response, torch.ones_like(response)), self.tolerance)
        deviation = posterior_std(noise, program.bounds)
        # of the state behind each sub-interval: from there to the next one; the sample has none
        return self.step_tolerance * torch.cat([deviation[1:], deviation[-1:]])

    @property
    def slides(self) -> bool:
        return True

    def words(self) -> list[str]:
        return [f"window {self.window}"]


@dataclass(frozen=True)
class Intervals(Program):
    """The coarse start, then windows; a run whose windows slide by more than one sub-interval leaves waves out."""

    window: int
    num_coarse: int
    begins: tuple[int, ...]  # the sub-interval that each wave's window begins at

    @cached_property
    def waves_of(self) -> dict[int, list[int]]:
        """The waves of the window that begins at each sub-interval, behind the coarse start."""
        found: dict[int, list[int]] = {}
        for number in range(self.num_coarse, len(self.waves)):
            found.setdefault(self.begins[number], []).append(number)
        return found

    @cached_property
    def final_steps(self) -> tuple[int, ...]:
        """As of `Program`: those before the window of the next wave."""
        return (*(self.bounds[begin] for begin in self.begins[1:]), self.num_steps)


@cached
def intervals(num_steps: int, num_intervals: int, num_coarse: int, window: int) -> Intervals:
    """The waves of ParaSolver: those of the coarse start, and for each window as many as its longest sub-interval."""
    bounds = block_bounds(num_steps, num_intervals)
    num_coarse = min(num_coarse, num_intervals - 1)
    single = num_intervals == num_steps
    begins = [block if single else 0 for block in range(num_coarse)]
    starts = [Row(0, block, 0, bounds[block], coarse=not single, fine=single) for block in range(num_coarse)]
    waves = [Wave((row,), ()) for row in starts]
    for begin in range(num_coarse if single else 0, num_intervals):
        blocks = range(begin, min(begin + window, num_intervals))
        for step in range(max(bounds[block + 1] - bounds[block] for block in blocks)):
            inside = [block for block in blocks if bounds[block] + step < bounds[block + 1]]
            rows = (Row(begin + 1, each, step, bounds[each] + step, coarse=False, fine=True) for each in inside)
            waves.append(Wave(tuple(rows), ()))
            begins.append(begin)
    waves[-1] = Wave(waves[-1].rows, (Boundary(num_intervals, num_intervals),))
    return Intervals(num_steps, bounds, num_intervals, tuple(waves), window, num_coarse, tuple(begins))


def parasolver(x: Tensor, noise: NoiseTable, program: Intervals, bound: Tensor, inputs: SolverInputs) -> Core:
    """Run a program of `intervals`; one checkpoint, the sample.

    bound: of the movement of the state behind each sub-interval, [B]; zeros make the sample the sequential one.
    """
    states = _States(x, noise, program, inputs)
    # the first window begins behind the coarse start where that was exact
    num_blocks, first, iteration = program.num_blocks, program.begins[program.num_coarse], 0
    bounds = bound.tolist()
    for block in range(program.num_coarse):
        states.jump(block, (yield states.evaluate(block, states.x[block : block + 1])))
    last = min(first + program.window, num_blocks)
    states.extrapolate(program.num_coarse, last)
    while first < num_blocks:
        iteration += 1
        moved = yield from states.refine(first, last)
        # a state that moved too far was still made of states that had finished
        passed = min(last - first, num_within(moved, bounds[first:last]) + 1)
        states.error.slide(np.concatenate([np.zeros_like(moved[:1]), moved[: passed - 1]]))
        first += passed
        entered, last = last, min(first + program.window, num_blocks)
        states.extrapolate(entered, last)
    sample = states.x[-1].clone()
    yield Checkpoint(iteration, sample, states.samples, None, exact=False, error=states.error.bound)
    return sample


class _States:
    """The states where sub-intervals begin, and what steps carry to them.

    Attributes:
        x: [B + 1, batch, ...], the states.
        carried: [vectors, B + 1, batch, ...], x0 of the step before, or what `NoiseTable.memory` says; zero: nothing.
    """

    def __init__(self, x: Tensor, noise: NoiseTable, program: Intervals, inputs: SolverInputs) -> None:
        self.samples = tuple(range(len(x)))  # none stops before the others
        self._columns = _columns(noise, TensorSpec.of(x))
        self._weights = _weights_of_carried(self._columns, program.bounds)
        self.x = x.new_zeros(program.num_blocks + 1, *x.shape)
        vectors = 1 if noise.memory is None else noise.memory.vectors - 1
        self.carried = x.new_zeros(vectors, *self.x.shape)
        self.x[0] = x
        if inputs.carried is not None:
            self.carried[: len(inputs.carried), 0] = inputs.carried
        self._last_x0 = torch.zeros_like(x)
        self._noise, self._program, self._inputs = noise, program, inputs
        assumed = torch.ones(program.num_blocks, dtype=torch.float64, device="cpu")
        self.error = CarriedError(noise, program.bounds, assumed, x)

    def evaluate(self, number: int, rows: Tensor) -> Evaluate:
        network, positions = self._inputs.network, self._program.positions[number]
        # a copy: a network may write to its input
        rows = rows * self._columns["input_scale"][_places(positions)] if self._inputs.scaled else rows.clone()
        return Evaluate(as_input(rows, network), positions, self.samples, number)

    def jump(self, block: int, answer: Answer) -> None:
        """Cross a sub-interval with one network output: the coarse start."""
        start, stop = self._program.bounds[block : block + 2]
        here = slice(block, block + 1)
        x, carried, x0 = self._step((start,), self.x[here], self.carried[:, here], answer)
        self._last_x0 = x0[0]
        if stop - start == 1:
            self.x[block + 1], self.carried[:, block + 1] = x[0], carried[:, 0]
        else:
            self.extrapolate(block, block + 1)

    def extrapolate(self, first: int, last: int) -> None:
        """The states behind `first` up to `last`, with the x0 predicted last held constant."""
        noise, draws = self._noise, self._inputs.draws
        for block in range(first, last):
            start, stop = self._program.bounds[block : block + 2]
            step, weights = chained(noise, None, start, stop)
            x = step.a * self.x[block] + step.c * self._last_x0
            if noise.spread is not None and draws is not None:
                x = x + torch.tensordot(draws.new_tensor(weights), draws[start:stop], dims=1)
            if self._inputs.constrain is not None:
                x = self._inputs.constrain(x, stop, self.samples)
            self.x[block + 1] = x
            self.carried[:, block + 1] = self._guessed(stop, x)

    def refine(self, first: int, last: int) -> Generator[Evaluate, Answer, Array]:
        """Solve a window, and update the states behind; by how much each has moved, [states, batch]."""
        program, inputs = self._program, self._inputs
        x, carried = self.x[first:last], self.carried[:, first:last]
        for number in program.waves_of[first]:
            blocks = [row.block - first for row in program.waves[number].rows]
            inside = _places(blocks)
            answer = yield self.evaluate(number, x[inside])
            found_x, found_carried, x0 = self._step(program.positions[number], x[inside], carried[:, inside], answer)
            if len(blocks) == last - first:
                x, carried = found_x, found_carried
            else:  # shorter sub-intervals have ended
                x, carried = x.clone(), carried.clone()
                x[inside], carried[:, inside] = found_x, found_carried
            if blocks[-1] == last - 1 - first:
                self._last_x0 = x0[-1]
        behind = slice(first + 1, last + 1)
        positions = program.bounds[behind]
        moved, moved_along = (x - self.x[behind]).cumsum(0), (carried - self.carried[:, behind]).cumsum(1)
        if self._weights is None:
            (found,) = rms([moved])
            self.error.see(first, self.x[first:last], x)
        else:
            # a step answers to what it departs from, and to what is carried to it: only the first is looked for
            arrived = x - torch.einsum("vb,vb...->b...", self._weights[:, first:last], self.carried[:, first:last])
            # a state may stay where it is while what is carried to it moves, and with that where its step arrives
            brought = torch.einsum("vb,vb...->b...", self._weights[:, behind], moved_along)
            found = np.maximum(*rms([moved, brought]))
            self.error.see(first, self.x[first:last], arrived)
        # F_j(x_j) + (x_j^new - x_j)
        self.x[behind] = x
        self.x[first + 2 : last + 1].add_(moved[:-1])
        self.carried[:, behind] = carried
        self.carried[:, first + 2 : last + 1].add_(moved_along[:, :-1])
        if inputs.constrain is not None:
            self.x[behind] = inputs.constrained(self.x[behind], positions, self.samples)
        if inputs.trajectory is not None:
            for position, state in zip(positions, self.x[behind].clone(), strict=True):
                inputs.trajectory.record(position, state, self.samples)
        return found

    def _guessed(self, cut: int, x: Tensor) -> Tensor:
        """What would be carried to a state x if the x0 predicted last had been that of all steps before."""
        noise, x0 = self._noise, self._last_x0
        if noise.memory is None:
            return x0[None]
        found = torch.zeros_like(self.carried[:, 0])
        if cut < noise.num_steps:
            alpha, sigma = noise.numbers["alpha"][cut], noise.numbers["sigma"][cut]
            for vector, guess in zip(found, guessed_history(noise, cut), strict=False):
                vector.copy_(guess.x0 * x0 + guess.eps / sigma * (x - alpha * x0))
        return found

    def _step(
        self, positions: tuple[int, ...], x: Tensor, carried: Tensor, answer: Answer
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The fine steps from these positions, what they carry, and the x0 predicted there; [.., rows, batch, ...]."""
        inputs, rows, column = self._inputs, _places(positions), self._columns
        m = guided(output_of(answer), inputs.guidance, x.dtype)
        p, q, *numbers = column["steps"][:, rows].unbind()
        x0 = clamped(p * x + q * m, self._noise.clip)
        if self._noise.memory is None:
            a, b, c, d, spread = numbers
            before = carried[0]
            if positions[0] == 0 and inputs.carried is None:  # there is no step before the first
                before = torch.cat([x0[:1], before[1:]])
            x = a * x + b * m + c * x0 + d * before
            if self._noise.spread is not None and inputs.draws is not None:
                x = x + spread * inputs.draws[rows]
            carried = x0[None]
        else:
            made = torch.einsum("rkl,lr...->kr...", column["keep"][rows], torch.cat([x[None], carried]))
            made = made + column["of_m"][:, rows] * m
            if inputs.draws is not None:
                made = made + column["of_z"][:, rows] * inputs.draws[rows]
            x, carried = made[0], made[1:]
        x = inputs.constrained(x, [position + 1 for position in positions], self.samples)
        if inputs.trajectory is not None:
            for row, position in enumerate(positions):
                inputs.trajectory.record(position + 1, x[row], self.samples)
                count = 1 if self._noise.memory is None else self._noise.memory.carried(position + 1)
                inputs.trajectory.record_carried(position + 1, carried[:count, row], self.samples)
        return x, carried, x0


def _places(places: Sequence[int]) -> slice | list[int]:
    """Ascending places as an index: a slice, which copies nothing, where none is left out."""
    first, last = places[0], places[-1] + 1
    return slice(first, last) if last - first == len(places) else list(places)


def _weights_of_carried(columns: dict[str, Tensor], bounds: tuple[int, ...]) -> Tensor | None:
    """Of what is carried to each sub-interval, in its first step, [vectors, B + 1], and to the end, where it is zero.

    None: steps take nothing of what is carried.
    """
    starts = list(bounds[:-1])
    found = columns["keep"][starts, 0, 1:].mT if "keep" in columns else columns["steps"][5].flatten(1)[None, starts, 0]
    return torch.cat((found, torch.zeros_like(found[:, :1])), 1) if bool(found.any()) else None


@cached
def _columns(noise: NoiseTable, spec: TensorSpec) -> dict[str, Tensor]:
    """The coefficients of the network's input and of the fine steps, for states like these.

    input_scale is [N, 1, ...]. steps, [7, N, 1, ...], are p, q, a, b, c, d and the spread. With `NoiseTable.memory`
    these are p and q, and those of the steps are keep, [N, 1 + vectors, 1 + vectors], and of_m and of_z,
    [1 + vectors, N, 1, ...].
    """
    steps, found = [noise.p, noise.q], {"input_scale": spec.column(noise.input_scale)}
    if noise.memory is None:
        of_steps = [fine_step(noise, index) for index in range(noise.num_steps)]
        steps += torch.tensor(of_steps, dtype=torch.float64, device="cpu").unbind(1)
        steps.append(torch.zeros_like(noise.p) if noise.spread is None else noise.spread)
    else:
        keep, of_m, of_z = _padded(noise.memory)
        found["keep"] = keep.to(spec.device, spec.dtype)
        found |= {name: _stacked(values, spec) for name, values in (("of_m", of_m), ("of_z", of_z))}
    return found | {"steps": _stacked(steps, spec)}


def _stacked(columns: Iterable[Tensor], spec: TensorSpec) -> Tensor:
    return torch.stack([spec.column(each) for each in columns])


def _padded(memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
    """The recursion with as many vectors in every step: keep [N, K, K], of_m and of_z [K, N]; zeros are added."""
    steps, most = len(memory.keep), memory.vectors
    keep, of_m, of_z = (
        torch.zeros(steps, most, most, dtype=torch.float64, device="cpu"),
        torch.zeros(most, steps, dtype=torch.float64, device="cpu"),
        torch.zeros(most, steps, dtype=torch.float64, device="cpu"),
    )
    for index in range(steps):
        rows, columns = memory.keep[index].shape
        keep[index, :rows, :columns] = memory.keep[index]
        of_m[:rows, index] = memory.of_m[index]
        of_z[:rows, index] = memory.of_z[index].sum(1)  # of one draw at most
    return keep, of_m, of_z
