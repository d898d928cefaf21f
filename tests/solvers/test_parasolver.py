"""ParaSolver: wave for wave what its paper says, written down a second time and more simply."""

from __future__ import annotations

import pytest
import torch
from cores import feed, table
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from problems import noise
from samplers import DIMENSIONS, mixture
from torch import Tensor

from srds_fast import InvalidArgument
from srds_fast.methods import ParaSolver
from srds_fast.planner.choose import choose
from srds_fast.planner.settings import Settings
from srds_fast.sampling.rows import draw_noise
from srds_fast.schedulers.table import NoiseTable
from srds_fast.solvers.contract import SolverInputs
from srds_fast.solvers.parasolver import intervals
from srds_fast.solvers.program import block_bounds
from srds_fast.solvers.sliding import effect_of_movements, expected_responses, posterior_std, shared_bounds

STEPS = 24
SCHEDULERS = {
    "ddim": DDIMScheduler(clip_sample=False),
    "ddim-clip": DDIMScheduler(),
    "ddpm": DDPMScheduler(clip_sample=False),
    "dpm": DPMSolverMultistepScheduler(),
}


class Reference:
    """The method, state by state, with the steps as the table defines them.

    Attributes:
        calls: positions of each network call, those in parallel in one.
    """

    def __init__(self, grid: NoiseTable, draws: Tensor | None, options: ParaSolver) -> None:
        self.grid, self.draws, self.options = grid, draws, options
        self.bounds = block_bounds(grid.num_steps, options.num_intervals or grid.num_steps)
        self.calls: list[tuple[int, ...]] = []

    def step(self, index: int, x: Tensor, m: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.grid.step(index, x, m, x0, None if self.draws is None else self.draws[index])

    def coast(self, block: int, x: Tensor, x0: Tensor) -> Tensor:
        """The steps of a sub-interval with the output that stands for this x0."""
        for index in range(self.bounds[block], self.bounds[block + 1]):
            m = (x0 - self.grid.p[index] * x) / self.grid.q[index]
            x, _ = self.step(index, x, m, x0)
        return x

    def call(self, index: int, x: Tensor) -> Tensor:
        return mixture(x, self.grid.timesteps[index].expand(len(x)))

    def allowed(self) -> list[float]:
        """By how much the state behind each sub-interval may move."""
        if self.options.step_tolerance is None:
            response = expected_responses(self.grid, tuple(self.bounds))
            assert self.options.tolerance is not None
            return shared_bounds(
                effect_of_movements(response, torch.ones_like(response)), self.options.tolerance
            ).tolist()
        deviation = posterior_std(self.grid, tuple(self.bounds)).tolist()
        return [self.options.step_tolerance * each for each in [*deviation[1:], deviation[-1]]]

    def run(self, x: Tensor) -> Tensor:
        options, bounds, count = self.options, self.bounds, len(self.bounds) - 1
        states: list[Tensor] = [x]
        cleans: list[Tensor | None] = [None]
        for block in range(min(options.num_coarse, count - 1)):
            self.calls.append((bounds[block],))
            m = self.call(bounds[block], states[-1])
            after, x0 = self.step(bounds[block], states[-1], m, cleans[-1])
            if bounds[block + 1] - bounds[block] > 1:
                after = self.coast(block, states[-1], x0)
            states.append(after)
            cleans.append(x0)
        newest = cleans[-1]
        assert newest is not None
        for block in range(len(states) - 1, count):
            states.append(self.coast(block, states[block], newest))
            cleans.append(newest)
        allowed = self.allowed()
        first = len(self.calls) if count == self.grid.num_steps else 0
        last = min(first + options.window, count)
        while first < count:
            solved: list[tuple[Tensor, Tensor]] = []
            for block in range(first, last):
                state, clean = states[block], cleans[block]
                for index in range(bounds[block], bounds[block + 1]):
                    state, clean = self.step(index, state, self.call(index, state), clean)
                assert clean is not None
                solved.append((state, clean))
            longest = max(bounds[block + 1] - bounds[block] for block in range(first, last))
            for step in range(longest):
                positions = (bounds[block] + step for block in range(first, last))
                inside = zip(positions, bounds[first + 1 : last + 1], strict=True)
                self.calls.append(tuple(position for position, stop in inside if position < stop))
            newest = solved[-1][1]
            moved: list[Tensor] = []
            drift, drift_x0 = torch.zeros_like(x), torch.zeros_like(x)
            for block, (state, clean) in enumerate(solved, start=first):
                before, before_x0 = states[block + 1], cleans[block + 1]
                assert before_x0 is not None
                states[block + 1], cleans[block + 1] = state + drift, clean + drift_x0
                drift, drift_x0 = drift + state - before, drift_x0 + clean - before_x0
                moved.append(drift.square().mean(1).sqrt())
            for block in range(first, last):
                if not bool((moved[block - first] <= allowed[block]).all()):
                    break
            first = block + 1
            entered, last = last, min(first + options.window, count)
            for block in range(entered, last):
                states[block + 1], cleans[block + 1] = self.coast(block, states[block], newest), newest
        return states[-1]


@pytest.mark.parametrize(
    "options",
    [
        ParaSolver(tolerance=4e-3),
        ParaSolver(tolerance=0.1, num_intervals=9),
        ParaSolver.published(),
        ParaSolver(num_coarse=2, window=6, step_tolerance=0.5),
        ParaSolver(num_coarse=3, window=4, step_tolerance=0.3, num_intervals=9),
        ParaSolver(num_coarse=1, window=20, step_tolerance=2.0, num_intervals=6),
    ],
    ids=["tolerance", "tolerance-intervals", "published", "loose", "intervals", "all-intervals"],
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_does_what_the_paper_says(name: str, options: ParaSolver) -> None:
    stock = SCHEDULERS[name]
    grid, x = table(STEPS, stock), noise(2, DIMENSIONS)
    draws = draw_noise(grid, x, x.dtype, torch.Generator().manual_seed(0))
    reference = Reference(grid, draws, options)
    expected = reference.run(x)
    plan = choose(STEPS, Settings(method=options))
    found, waves, checkpoints = feed(
        plan.options.core(x, grid, plan.program(), SolverInputs(draws=draws), bitwise=False), mixture, grid
    )
    assert [wave.positions for wave in waves] == reference.calls
    assert float((found - expected).abs().max()) <= 1e-9 * max(1.0, float(expected.abs().max()))
    assert [checkpoint.error is not None for checkpoint in checkpoints] == [True]


def test_the_slowest_program_slides_by_one_interval() -> None:
    single, cut = intervals(8, 8, 3, 4), intervals(8, 3, 2, 2)
    assert single.positions[:4] == ((0,), (1,), (2,), (3, 4, 5, 6))
    assert (single.num_waves, single.final_steps) == (8, (1, 2, 3, 4, 5, 6, 7, 8))
    # sub-intervals 0-1, 2-4 and 5-7
    assert cut.positions == ((0,), (2,), (0, 2), (1, 3), (4,), (2, 5), (3, 6), (4, 7), (5,), (6,), (7,))
    assert cut.final_steps == (0, 0, 0, 0, 2, 2, 2, 5, 5, 5, 8)


def test_more_intervals_than_steps_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="Pass at most 4"):
        choose(4, Settings(method=ParaSolver(num_intervals=5)))
