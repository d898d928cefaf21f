"""CHORDS: its program, and its core fed by hand on problems in closed form."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from cores import Denoiser, feed, one_by_one, table
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import noise
from samplers import DIMENSIONS, mixture
from torch import Tensor

from srds_fast.errors import InvalidArgument
from srds_fast.planner.choose import choose
from srds_fast.planner.settings import Settings
from srds_fast.sampling.rows import draw_noise
from srds_fast.schedulers.table import NoiseTable
from srds_fast.solvers.chords import PAPER_STARTS, Chords, chord_starts, chords, chords_program
from srds_fast.solvers.contract import SolverInputs
from srds_fast.solvers.program import Boundary


@st.composite
def shapes(draw: st.DrawFn, most: int = 24) -> tuple[int, tuple[int, ...]]:
    """Steps, and starts of cores anywhere among them."""
    num_steps = draw(st.integers(1, most))
    others = draw(st.sets(st.integers(1, num_steps - 1), max_size=6)) if num_steps > 1 else set()
    return num_steps, (0, *sorted(others))


@given(shapes(60))
def test_counts(shape: tuple[int, tuple[int, ...]]) -> None:
    num_steps, starts = shape
    found = chords_program(num_steps, starts)
    assert found.num_waves == num_steps
    assert found.num_rows == sum(num_steps - start for start in starts)
    assert found.peak_rows == found.num_cores == len(starts) == found.num_iterations + 1
    for core, start in enumerate(starts):
        assert found.spent(found.core(core)).waves == core + num_steps - start
    assert found.final_steps == tuple(range(1, num_steps + 1))
    assert all(wave.lanes() == (len(wave.rows),) for wave in found)


@pytest.mark.parametrize("num_cores", PAPER_STARTS)
def test_starts_of_the_paper(num_cores: int) -> None:
    assert chord_starts(50, num_cores) == PAPER_STARTS[num_cores]
    assert chord_starts(100, num_cores) == tuple(2 * start for start in PAPER_STARTS[num_cores])


@given(st.integers(1, 120), st.data())
def test_there_are_starts_for_any_number_of_cores(num_steps: int, data: st.DataObject) -> None:
    num_cores = data.draw(st.integers(1, num_steps))
    starts = chord_starts(num_steps, num_cores)
    assert len(starts) == num_cores
    found = chords_program(num_steps, starts)
    assert all(found.begins(core) for core in range(1, num_cores)), "a core that is never rectified"


@pytest.mark.parametrize("starts", [(), (1, 2), (2, 2), (0, True), (0, 1.5), (0, 1, 2)], ids=str)
def test_starts_out_of_range_are_named(starts: Any) -> None:
    with pytest.raises(InvalidArgument, match="starts is"):
        Chords(2, starts)


def test_a_core_that_has_no_step_left_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="A core begins at step 5"):
        choose(5, Settings(method=Chords(2, (0, 5))))


def naive(x: Tensor, grid: NoiseTable, starts: tuple[int, ...], denoiser: Denoiser) -> list[Tensor]:
    """The samples of all cores, the fastest first, written as the method reads: core by core, from slow to fast."""
    alpha, sigma, alpha_next, sigma_next = grid.alpha, grid.sigma, grid.alpha_next, grid.sigma_next

    def jump(x: Tensor, m: Tensor, start: int, stop: int) -> Tensor:
        x0 = (x - sigma[start] * m) / alpha[start]
        return alpha_next[stop - 1] * x0 + sigma_next[stop - 1] * m

    def output(x: Tensor, position: int) -> Tensor:
        return denoiser(x, grid.timesteps[position].expand(len(x)))

    samples: list[Tensor] = []
    slower: dict[int, tuple[Tensor, Tensor]] = {}
    for core, start in enumerate(starts):
        states: dict[int, tuple[Tensor, Tensor]] = {}
        span = start - starts[core - 1] if core > 0 else grid.num_steps + 1
        current = jump(*slower[starts[core - 1]], starts[core - 1], start) if core > 0 else x
        for position in range(start, grid.num_steps):
            states[position] = current, output(current, position)
            current = jump(*states[position], position, position + 1)
            begin = position + 1 - span
            if begin >= start and (begin - start) % span == 0:
                old, new = (jump(*each[begin], begin, position + 1) for each in (states, slower))
                current = current + (new - old)
        samples.insert(0, current)
        slower = states
    return samples


@given(shapes(16), st.sampled_from([None, 1, 2, 3]))
def test_every_core_does_what_the_method_says(shape: tuple[int, tuple[int, ...]], max_rows: int | None) -> None:
    x, grid = noise(2, DIMENSIONS), table(shape[0])
    plan = chords_program(*shape).limited_to(max_rows)
    assert max_rows is None or plan.peak_rows <= max_rows
    _, waves, checkpoints = feed(chords(x, grid, plan), mixture, grid)
    expected = naive(x, grid, shape[1], mixture)
    assert [wave.positions for wave in waves] == list(plan.positions)
    assert [found.iteration for found in checkpoints] == list(range(len(expected)))
    assert [found.exact for found in checkpoints] == [False] * plan.num_iterations + [True]
    assert checkpoints[0].change is None
    for before, found in pairwise(checkpoints):
        torch.testing.assert_close(found.change, (found.sample - before.sample).abs().mean(1), rtol=1e-10, atol=1e-14)
    assert all(found.stationary is None for found in checkpoints)
    for found, sample in zip(checkpoints, expected, strict=True):
        torch.testing.assert_close(found.sample, sample, rtol=1e-10, atol=1e-10)


def test_cores_that_agree_are_not_touched() -> None:
    """A core that begins one step after another is that one: every bracket is zero, to the bit."""
    x, grid = noise(2, DIMENSIONS), table(12)
    expected = one_by_one(x, grid, mixture, by_row=True)
    _, _, checkpoints = feed(chords(x, grid, chords_program(12, range(12))), mixture, grid, by_row=True)
    assert len(checkpoints) == 12
    assert all(torch.equal(found.sample, expected) for found in checkpoints)
    assert all(not found.change.any() for found in checkpoints[1:])


@pytest.mark.parametrize(
    "stock",
    [
        DDIMScheduler(prediction_type="sample"),
        DDIMScheduler(prediction_type="sample", clip_sample=False),
        DDPMScheduler(prediction_type="sample"),
        DDPMScheduler(prediction_type="sample", clip_sample=False),
        DPMSolverMultistepScheduler(prediction_type="sample"),
    ],
    ids=["ddim", "ddim-unclipped", "ddpm", "ddpm-unclipped", "dpm"],
)
@settings(max_examples=5)
@given(shapes(14))
def test_where_x0_does_not_change_jumps_are_the_steps_they_replace(
    stock: Any, shape: tuple[int, tuple[int, ...]]
) -> None:
    """With the noise of these steps: every core is then the sequential sampler, from the first one to arrive on."""
    grid = table(shape[0], stock)
    x, x0 = noise(2, 8), noise(1, 8, seed=1)
    inputs = SolverInputs(draws=draw_noise(grid, x, x.dtype, torch.Generator().manual_seed(3)))
    expected = one_by_one(x, grid, lambda x, t: x0.expand_as(x), inputs)
    _, _, checkpoints = feed(chords(x, grid, chords_program(*shape), inputs), lambda x, t: x0.expand_as(x), grid)
    for found in checkpoints:
        torch.testing.assert_close(found.sample, expected, rtol=1e-10, atol=1e-10)


def test_samples_that_stop_between_cores_that_arrive_together() -> None:
    x, grid = noise(3, DIMENSIONS), table(12)
    plan = chords_program(12, (0, 4, 5, 6))
    together = [wave.boundaries for wave in plan if len(wave.boundaries) > 1]
    assert together == [(Boundary(0, 1), Boundary(1, 1), Boundary(2, 1))]
    found, _, checkpoints = feed(chords(x, grid, plan), mixture, grid, lambda each: tuple(range(1, len(each.samples))))
    assert [each.samples for each in checkpoints] == [(0, 1, 2), (1, 2), (2,)]
    assert all(torch.equal(found[iteration], each.sample[0]) for iteration, each in enumerate(checkpoints))
