"""ParaSolver (Lu, Zhu, Hou, ICLR 2025): a coarse start, then sub-intervals that are refined in a sliding window.

    x_{j+1}^new = F_j(x_j) + ( x_j^new - x_j )

x_j are the states where sub-intervals begin, F_j the fine steps across sub-interval j. All sub-intervals of the window
are solved at the same time, each one step after another. The update is a Newton step with the identity as the Jacobian
of F. The first state of the window is exact where nothing is tolerated, so each iteration makes one more exact.

First the network is asked at the beginnings of the first few sub-intervals, one after another. All states behind them
follow from the x0 predicted last, held constant. A state that enters the window later follows in the same way from the
x0 predicted at the end of the window. As in the authors' code, a state is finished if the mean square of its movement
is within step_tolerance^2 times the variance of DDPM's posterior from there to the next state.

Choices where the paper leaves details open, or where we deviate from the authors' code:
- Where a sub-interval is one step, the coarse start is exact, and the window begins behind it. The authors' window
  begins at step 0 and evaluates these rows again.
- At least one sub-interval is left to the window, however many coarse steps are asked for.
- x0 held constant means the scheduler's own steps with that x0, clipping and noise included (`steps.chained`).
- Multistep schedulers: the x0 to look back at belongs to the state, and gets the same update.
- Noise is drawn once for each fine step, as the sequential sampler draws it, so the limit is that sampler.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import InvalidArgument
from ..kernels.fixed_point_wave.operations import guided
from ..schedulers.steps import TensorSpec, chained, fine_step
from ..schedulers.table import NoiseTable
from .contract import Answer, Checkpoint, Core, Evaluate, SolverInputs, output_of
from .method import Method, Target, check_whole
from .program import Boundary, Program, Row, Wave, block_bounds


@dataclass(frozen=True)
class ParaSolver(Method):
    """ParaSolver (Lu et al., ICLR 2025): a coarse start, then sub-intervals that are refined in a sliding window.

    Attributes:
        num_coarse: sub-intervals that the coarse start crosses, one network call each.
        window: sub-intervals that are refined at a time.
        step_tolerance: bound on the movement of a state, in standard deviations of DDPM's posterior; the window slides
            over states within it.
        num_intervals: sub-intervals the steps are cut into. None: one for each step, as in the authors' experiments.
    """

    name: ClassVar[str] = "parasolver"
    about: ClassVar[str] = "five steps, then Picard iteration on a sliding window of 10"
    first_iteration: ClassVar[int] = 1
    num_coarse: int = 5
    window: int = 10
    step_tolerance: float = 0.05
    num_intervals: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_coarse", "window", "num_intervals"):
            value = getattr(self, name)
            check_whole(name, 0 if value is None and name != "num_intervals" else value, 1)
        tolerance = self.step_tolerance
        if not isinstance(tolerance, int | float) or isinstance(tolerance, bool) or not 0 < tolerance < math.inf:
            raise InvalidArgument(f"step_tolerance is {tolerance!r}. It must be a positive number. Pass one.")

    def with_defaults(self, target: Target) -> Self:
        if (self.num_intervals or 0) > target.num_steps:
            raise InvalidArgument(
                f"num_intervals is {self.num_intervals} for {target.num_steps} steps. A sub-interval holds at least "
                f"one step. Pass at most {target.num_steps}, or leave it out."
            )
        return self

    def most_iterations(self, target: Target) -> int:
        return self.num_intervals or target.num_steps

    def program(self, num_steps: int, max_iterations: int, *, max_rows: int | None, bitwise: bool) -> Program:
        window = min(self.window, max_rows or self.window)
        return intervals(num_steps, self.num_intervals or num_steps, self.num_coarse, window)

    def core(self, x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs, *, bitwise: bool) -> Core:
        assert isinstance(program, Intervals)
        return parasolver(x, noise, program, 0.0 if bitwise else self.step_tolerance, inputs)

    @property
    def slides(self) -> bool:
        return True

    def num_checkpoints(self, max_iterations: int) -> int:
        return 1

    def words(self) -> list[str]:
        return [f"window {self.window}"]


@dataclass(frozen=True)
class Intervals(Program):
    """The coarse start, then windows that slide by one sub-interval at the slowest.

    A run whose windows slide further leaves waves out.

    Attributes:
        window: sub-intervals in a window, at most.
        num_coarse: waves of the coarse start.
        begins: of each wave, the sub-interval that its window begins at.
    """

    window: int
    num_coarse: int
    begins: tuple[int, ...]

    @property
    def first(self) -> int:
        """The sub-interval that the first window begins at."""
        return self.begins[self.num_coarse]

    @cached_property
    def final_steps(self) -> tuple[int, ...]:
        """As of `Program`: those before the window of the next wave."""
        return (*(self.bounds[begin] for begin in self.begins[1:]), self.num_steps)


@lru_cache(maxsize=64, typed=True)
def intervals(num_steps: int, num_intervals: int, num_coarse: int, window: int) -> Intervals:
    """The waves of ParaSolver: those of the coarse start, and for each window as many as its longest sub-interval."""
    bounds = block_bounds(num_steps, num_intervals)
    num_coarse = min(num_coarse, num_intervals - 1)
    single = num_intervals == num_steps
    waves = [
        Wave((Row(0, block, 0, bounds[block], coarse=not single, fine=single),), ()) for block in range(num_coarse)
    ]
    begins = [block if single else 0 for block in range(num_coarse)]
    for begin in range(num_coarse if single else 0, num_intervals):
        blocks = range(begin, min(begin + window, num_intervals))
        for step in range(max(bounds[block + 1] - bounds[block] for block in blocks)):
            inside = [block for block in blocks if bounds[block] + step < bounds[block + 1]]
            rows = (Row(begin + 1, each, step, bounds[each] + step, coarse=False, fine=True) for each in inside)
            waves.append(Wave(tuple(rows), ()))
            begins.append(begin)
    waves[-1] = Wave(waves[-1].rows, (Boundary(num_intervals, num_intervals),))
    return Intervals(num_steps, bounds, num_intervals, tuple(waves), window, num_coarse, tuple(begins))


def parasolver(x: Tensor, noise: NoiseTable, program: Intervals, tolerance: float, inputs: SolverInputs) -> Core:
    """Run a program of `intervals`; one checkpoint, the sample.

    Args:
        x: starting noise, [batch, ...]; its dtype is the dtype of the state.
        noise: table of N steps.
        program: the waves.
        tolerance: as `ParaSolver.step_tolerance`; 0: the sample is the sequential one.
        inputs: noise of stochastic steps, constraint, trajectory, history, the network's wishes.
    """
    states = _States(x, noise, program, inputs)
    for number in range(program.num_coarse):
        states.jump(number, (yield states.evaluate(number, states.x[number : number + 1])))
    states.extrapolate(program.num_coarse, program.num_blocks)
    bound = tolerance * _posterior_std(noise, program)
    first, last, iteration = program.first, min(program.first + program.window, program.num_blocks), 0
    while first < program.num_blocks:
        iteration += 1
        moved = yield from states.refine(first, last)
        # what is not a number is within no bound
        within = [*(moved.double().cpu() <= bound[first + 1 : last + 1, None]).all(1).tolist(), False]
        # a state that moved too far was still made of states that had finished
        first = min(last, first + within.index(False) + 1)
        entered, last = last, min(first + program.window, program.num_blocks)
        states.extrapolate(entered, last)
    sample = states.x[-1].clone()
    yield Checkpoint(iteration, sample, states.samples, None, exact=False, settled=True)
    return sample


class _States:
    """The states where sub-intervals begin, [B + 1, batch, ...], and how they are made.

    Attributes:
        samples: all of the batch: none stops before the others.
        x: the states.
        x0: [B + 1, batch, ...], the x0 that the step from each looks back at.
    """

    def __init__(self, x: Tensor, noise: NoiseTable, program: Intervals, inputs: SolverInputs) -> None:
        self.samples = tuple(range(len(x)))
        self.x = x.new_zeros(program.num_blocks + 1, *x.shape)
        self.x0 = torch.zeros_like(self.x)
        self.x[0] = x
        self._noise, self._program, self._inputs = noise, program, inputs
        self._columns = _columns(noise, TensorSpec.of(x))
        self._looks_back = inputs.x0_prev is not None
        if inputs.x0_prev is not None:
            self.x0[0] = inputs.x0_prev
        self._last_x0 = self.x0[0]
        self._first_waves = [
            program.begins.index(begin, program.num_coarse) for begin in range(program.first, len(self.x) - 1)
        ]

    def evaluate(self, number: int, rows: Tensor) -> Evaluate:
        """Wave `number`. rows: the states that the network is evaluated at, [rows, batch, ...]."""
        network, positions = self._inputs.network, self._program.positions[number]
        if self._inputs.scaled:
            rows = rows * self._columns["input_scale"][list(positions)]
        given = network.empty(len(positions), rows[0])
        given.unflatten(0, (network.branches, -1)).copy_(rows[None])
        return Evaluate(given, positions, self.samples, number)

    def jump(self, block: int, answer: Answer) -> None:
        """Cross a sub-interval with one network output: the coarse start."""
        start, stop = self._program.bounds[block : block + 2]
        x, x0 = self._stepped((start,), self.x[block : block + 1], self.x0[block : block + 1], answer)
        self._last_x0 = x0[0]
        if stop - start == 1:
            self.x[block + 1], self.x0[block + 1] = x[0], x0[0]
        else:
            self.extrapolate(block, block + 1)

    def extrapolate(self, first: int, last: int) -> None:
        """The states behind `first` up to `last`, with the x0 predicted last held constant."""
        noise, bounds, draws = self._noise, self._program.bounds, self._inputs.draws
        for block in range(first, last):
            start, stop = bounds[block : block + 2]
            step, weights = chained(noise, None, start, stop)
            x = step.a * self.x[block] + step.c * self._last_x0
            if noise.spread is not None and draws is not None:
                x = x + torch.tensordot(draws.new_tensor(weights), draws[start:stop], dims=1)
            self.x[block + 1], self.x0[block + 1] = self._constrained(x, stop), self._last_x0

    def refine(self, first: int, last: int) -> Generator[Evaluate, Answer, Tensor]:
        """Solve the sub-intervals of a window, and update the states behind each.

        Returns:
            root mean square over a state's elements of what each moved by, [last - first, batch].
        """
        bounds, number = self._program.bounds, self._first_waves[first - self._program.first]
        x, x0 = self.x[first:last].clone(), self.x0[first:last].clone()
        for step in range(max(bounds[block + 1] - bounds[block] for block in range(first, last))):
            inside = [block - first for block in range(first, last) if bounds[block] + step < bounds[block + 1]]
            positions = tuple(bounds[first + each] + step for each in inside)
            answer = yield self.evaluate(number + step, x[inside])
            x[inside], x0[inside] = self._stepped(positions, x[inside], x0[inside], answer)
        self._last_x0 = x0[-1]
        moved = self._updated(self.x, x, first, last)
        self._updated(self.x0, x0, first, last)
        for block in range(first, last):
            self.x[block + 1] = self._constrained(self.x[block + 1], bounds[block + 1])
            if self._inputs.trajectory is not None:
                self._inputs.trajectory.record(bounds[block + 1], self.x[block + 1].clone(), self.samples)
        return moved.square().flatten(2).mean(2).sqrt()

    def _updated(self, values: Tensor, solved: Tensor, first: int, last: int) -> Tensor:
        """Write the update to the values behind the solved ones; returns what each moved by."""
        moved = (solved - values[first + 1 : last + 1]).cumsum(0)
        values[first + 1] = solved[0]
        values[first + 2 : last + 1] = solved[1:] + moved[:-1]
        return moved

    def _stepped(
        self, positions: tuple[int, ...], x: Tensor, x0_before: Tensor, answer: Answer
    ) -> tuple[Tensor, Tensor]:
        """The fine steps from these positions, and the x0 predicted there; [rows, batch, ...] each."""
        inputs, rows = self._inputs, list(positions)
        a, b, c, d, p, q, spread = (self._columns[name][rows] for name in ("a", "b", "c", "d", "p", "q", "spread"))
        m = guided(output_of(answer), inputs.guidance, x.dtype)
        x0 = p * x + q * m
        if self._noise.clip is not None:
            x0 = x0.clamp(-self._noise.clip, self._noise.clip)
        if positions[0] == 0 and not self._looks_back:  # there is no step before the first
            x0_before = torch.cat([x0[:1], x0_before[1:]])
        x = a * x + b * m + c * x0 + d * x0_before
        if self._noise.spread is not None and inputs.draws is not None:
            x = x + spread * inputs.draws[rows]
        x = torch.stack([self._constrained(each, position + 1) for each, position in zip(x, positions, strict=True)])
        if inputs.trajectory is not None:
            for position, state, clean in zip(positions, x, x0, strict=True):
                inputs.trajectory.record(position + 1, state, self.samples)
                inputs.trajectory.record_x0(position, clean, self.samples)
        return x, x0

    def _constrained(self, x: Tensor, position: int) -> Tensor:
        constrain = self._inputs.constrain
        return x if constrain is None else constrain(x, position, self.samples)


@lru_cache(maxsize=32)
def _columns(noise: NoiseTable, spec: TensorSpec) -> dict[str, Tensor]:
    """The coefficients of the fine steps and of the network's input, [N, 1, ...] each, for states like these."""
    steps = torch.tensor([fine_step(noise, index) for index in range(noise.num_steps)], dtype=torch.float64)
    spread = torch.zeros_like(noise.p) if noise.spread is None else noise.spread
    named = dict(zip("abcd", steps.unbind(1), strict=True))
    named |= {"p": noise.p, "q": noise.q, "spread": spread, "input_scale": noise.input_scale}
    shape = (-1, *[1] * spec.ndim)
    return {name: column.to(spec.device, spec.dtype).reshape(shape) for name, column in named.items()}


def _posterior_std(noise: NoiseTable, program: Intervals) -> Tensor:
    """[B + 1] float64: standard deviation of DDPM's posterior from each state to the next; the last one twice."""
    arrives = noise.sigma_next if noise.spread is None else (noise.sigma_next**2 + noise.spread**2).sqrt()
    starts, stops = list(program.bounds[:-1]), [bound - 1 for bound in program.bounds[1:]]
    alpha, sigma, alpha_next, sigma_next = (
        noise.alpha[starts],
        noise.sigma[starts],
        noise.alpha_next[stops],
        arrives[stops],
    )
    variance = sigma_next**2 / sigma**2 * (sigma**2 - (alpha / alpha_next) ** 2 * sigma_next**2)
    return torch.cat([variance, variance[-1:]]).clamp(min=0).sqrt()
