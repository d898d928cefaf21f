"""Solver cores, fed by hand: exactness, the exact prefix, and what a program promises, on problems in closed form."""

from __future__ import annotations

from functools import partial

import cores
import pytest
import torch
from cores import Denoiser, table
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import GaussianMixture, noise
from torch import Tensor

from srds_fast.solvers import program
from srds_fast.solvers.program import Program
from srds_fast.solvers.sequential import sequential
from srds_fast.solvers.srds import srds

MIXTURE = GaussianMixture.random()
# to the bit, however wide a wave is
feed = partial(cores.feed, by_row=True)


@settings(max_examples=8)
@given(st.integers(4, 16), st.data())
def test_the_layout_of_waves_does_not_change_a_bit(num_steps: int, data: st.DataObject) -> None:
    """Pipelined, plain, in lanes, narrow or wide: the same numbers, at every iteration."""
    num_blocks = data.draw(st.integers(2, num_steps))
    iterations = data.draw(st.integers(1, num_blocks))
    coarse_solver = data.draw(st.sampled_from(["ddim", "2m"]))
    x = noise(2, 64, seed=data.draw(st.integers(0, 99)))
    grid = table(num_steps)

    def samples(plan: Program) -> list[Tensor]:
        _, _, checkpoints = feed(srds(x, grid, plan, coarse_solver), MIXTURE, grid)
        return [checkpoint.sample for checkpoint in checkpoints]

    expected = samples(program.srds(num_steps, num_blocks, iterations))
    layouts = [
        program.srds(num_steps, num_blocks, iterations, False),
        program.srds(num_steps, num_blocks, iterations, False).limited_to(2),
        program.srds(num_steps, num_blocks, iterations).in_lanes(),
        program.srds(num_steps, num_blocks, iterations).limited_to(1),
        *(program.srds(num_steps, num_blocks, iterations, in_flight=most) for most in (1, 2)),
        program.srds(num_steps, num_blocks, iterations, in_flight=1).limited_to(2),
    ]
    for layout in layouts:
        for one, other in zip(expected, samples(layout), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("coarse_solver", ["ddim", "2m"])
def test_the_exact_prefix_is_bitwise_the_sequential_trajectory(coarse_solver: str) -> None:
    """Every state that the solve from boundary p of iteration p goes through, is the sequential one to the bit."""
    num_steps, num_blocks = 24, 6
    x = noise(2, 64)
    grid = table(num_steps)
    _, trajectory, _ = feed(sequential(x, grid, program.sequential(num_steps)), MIXTURE, grid)
    plan = program.srds(num_steps, num_blocks, num_blocks)
    _, waves, checkpoints = feed(srds(x, grid, plan, coarse_solver), MIXTURE, grid)
    assert [checkpoint.exact for checkpoint in checkpoints] == [False] * num_blocks + [True]
    seen = set()
    for wave, evaluated in zip(plan, waves, strict=True):
        for row, state in zip(wave.rows, evaluated.x, strict=True):
            if row.iteration >= row.block:
                assert torch.equal(state, trajectory[row.position].x[0]), row
                seen.add(row.position)
    assert seen == set(range(num_steps))


def test_stationary_says_that_no_boundary_moved() -> None:
    grid = table(20, prediction_type="sample")
    plan = program.srds(20, 5, 5)

    def stationary(denoiser: Denoiser, x: Tensor) -> list[list[bool]]:
        _, _, checkpoints = feed(srds(x, grid, plan, "ddim", bitwise=True), denoiser, grid)
        return [checkpoint.stationary.tolist() for checkpoint in checkpoints if checkpoint.stationary is not None]

    assert stationary(lambda x, t: torch.zeros_like(x), torch.zeros(2, 3, dtype=torch.float64)) == [[True, True]] * 5
    # x0 = 0 and sigma = 0 at the end: the last point is 0 in every iteration, but the ones before it move
    assert stationary(lambda x, t: torch.tanh(x) * (t > 0).to(x)[:, None], noise(2, 3))[0] == [False, False]
