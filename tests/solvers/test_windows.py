"""Windows that slide: bounds that follow from the tolerance asked for, and what is said of the error."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cores import table
from diffusers import DDIMScheduler
from problems import GaussianMixture, noise, scheduler
from samplers import run
from torch import Tensor

from bench.workloads import sharp
from srds_fast import sample
from srds_fast.methods import ParaDiGMS, ParaSolver, ParaTAA
from srds_fast.planner.choose import choose
from srds_fast.planner.settings import Settings
from srds_fast.solvers.convergence import LOOSEST
from srds_fast.solvers.sliding import (
    CAUTION,
    CAUTION_OF_SEEN,
    CarriedError,
    effect_of_movements,
    expected_responses,
    shared_bounds,
)

MIXTURE = GaussianMixture.random(64)
SLIDING: dict[str, Any] = {
    "paradigms": ParaDiGMS(),
    "paradigms-history": ParaDiGMS(history=1),
    "paradigms-published": ParaDiGMS.published(),
    "parataa-window": ParaTAA(window=10),
    "parataa-published": ParaTAA.published(window=10),
    "parasolver": ParaSolver(),
    "parasolver-intervals": ParaSolver(num_intervals=20),
}


@pytest.mark.parametrize("num_steps", [25, 50, 100])
@pytest.mark.parametrize("method", [ParaDiGMS(), ParaTAA(window=10)], ids=["paradigms", "parataa"])
def test_the_tolerance_asked_for_is_kept_in_few_waves(method: Any, num_steps: int) -> None:
    x = noise(48, 64, seed=3)
    expected, waves = sample(MIXTURE, x, scheduler(), num_steps, method="sequential").sample, []
    for tolerance in (4e-2, 4e-3, 4e-4):
        found = sample(MIXTURE, x, scheduler(), num_steps, method=method, tolerance=tolerance)
        beyond = (found.sample - expected).abs().mean(1) > tolerance
        # a sample that turns late may end near another centre, and no wave shows it
        assert int(beyond.sum()) <= 1
        assert found.report.missed <= 16
        waves.append(found.report.waves)
    # windows begin elsewhere with other bounds, and may so reach the end one wave later
    assert waves[0] - 1 <= waves[1] <= waves[2] <= num_steps
    assert waves[0] < waves[2]
    assert waves[1] < num_steps


@pytest.mark.parametrize("name", ["ddim-clip", "ddpm", "ddim-eta", "dpm", "euler", "flow"])
def test_the_tolerance_is_kept_by_other_schedulers(name: str) -> None:
    found, expected = (run(name, 40, batch=16, method=method) for method in ("paradigms", "sequential"))
    assert float((found - expected).abs().mean(1).max()) <= 4e-3


def amplifier(x: Tensor, t: Tensor) -> Tensor:
    """A network with random weights: x0 follows x, which grows as the noise falls."""
    return 0.1 * torch.tanh(x.roll(1, 1) - x) * (0.5 + t[:, None] / 2000)


@pytest.mark.parametrize("denoiser", [amplifier, MIXTURE], ids=["amplifier", "mixture"])
@pytest.mark.parametrize("name", SLIDING)
def test_converged_is_said_only_where_the_sample_is_within_the_tolerance(name: str, denoiser: Any) -> None:
    x = noise(16, 64, seed=2)
    expected = sample(denoiser, x, scheduler(), 50, method="sequential").sample
    for tolerance in (4e-2, 4e-3):
        found = sample(denoiser, x, scheduler(), 50, method=SLIDING[name], tolerance=tolerance)
        beyond = (found.sample - expected).abs().mean(1) > tolerance
        silent = sum(bool(off) and said for off, said in zip(beyond, found.report.converged, strict=True))
        assert silent <= (1 if denoiser is MIXTURE else 0)  # one turns late
        assert found.report.missed == found.report.converged.count(False)
    if name == "paradigms-published" and denoiser is amplifier:
        assert found.report.missed == 16


@pytest.mark.parametrize("method", [ParaDiGMS(), ParaSolver()], ids=["paradigms", "parasolver"])
@pytest.mark.parametrize("num_steps", [100, 200])
def test_steps_that_a_clip_holds_are_not_taken_to_shrink_errors(method: Any, num_steps: int) -> None:
    """x0 is clipped on the way to the state, not at it: no wave shows how the step answers there."""
    x, clips = noise(16, 8, seed=0), DDIMScheduler(clip_sample=True)
    expected = sample(half, x, clips, num_steps, method="sequential").sample
    found = sample(half, x, clips, num_steps, method=method)
    beyond = (found.sample - expected).abs().mean(1) > 4e-3
    assert not any(bool(off) and said for off, said in zip(beyond, found.report.converged, strict=True))
    assert min(found.report.estimated_error) > 0


def half(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x


@pytest.mark.parametrize("method", [ParaDiGMS(), ParaSolver()], ids=["paradigms", "parasolver"])
def test_what_a_multistep_scheduler_carries_is_not_taken_for_the_answer_of_a_step(method: Any) -> None:
    """What is carried moves as well, and may hide how a step answers to the state that it departs from."""
    silent = said = 0
    for problem in (sharp.modes(32, scheduler=sharp.multistep), sharp.modes(32, 40, 32, 0.2, sharp.multistep)):
        expected = problem.sequential(50)
        for tolerance in (4e-3, 4e-4):
            found = problem.sampled(50, method=method, tolerance=tolerance)
            beyond = (found.sample - expected).abs().mean(1) > tolerance
            silent += sum(bool(off) and told for off, told in zip(beyond, found.report.converged, strict=True))
            said += sum(found.report.converged)
    assert silent <= 1
    assert said > 32, "it is said of some"


def test_bounds_add_up_to_the_tolerance_for_gaussian_data() -> None:
    response = expected_responses(table(60), tuple(range(61)))
    effect = effect_of_movements(response, torch.ones_like(response))
    assert float(effect[-1]) == 0, "a movement of the sample itself leaves no error"
    bounds = shared_bounds(effect, 4e-3)
    assert float((effect * bounds).sum()) == pytest.approx(4e-3 / CAUTION, rel=0.05)
    assert bool((bounds > 0).all() and bounds.isfinite().all())
    assert torch.equal(shared_bounds(effect, 4e-2), shared_bounds(effect, LOOSEST))
    # where every step answers as the update assumes, nothing is left whatever moves
    assert bool(shared_bounds(torch.zeros(5, dtype=torch.float64), 4e-3).isfinite().all())


def test_what_rows_show_is_carried_through_the_steps() -> None:
    """Steps f(x) = 3 x: the first wave knows nothing of them, the second shows what they do to a movement."""
    grid, everywhere, x = table(6), tuple(range(7)), noise(2, 7)
    moved = np.array([[0.0, 0.0], [0.1, 0.2]])
    states = noise(4, 2, 7)

    def begun() -> CarriedError:
        carried = CarriedError(grid, everywhere, torch.ones(6, dtype=torch.float64), x)
        carried.see(0, states, 3 * states)
        carried.slide(moved)
        return carried

    carried = begun()
    again = states[2:] + noise(2, 2, 7, seed=1)
    carried.see(2, again, 3 * again)
    # of the second step 2 (3 x - x) times its movement; the third one amplifies it, and adds a residual
    carried.slide(moved[:1], np.array([[0.01, 0.02]]))
    torch.testing.assert_close(carried.bound, CAUTION_OF_SEEN * x.new_tensor([3 * 0.2 + 0.01, 3 * 0.4 + 0.02]))

    follows = expected_responses(grid, everywhere, math.inf)
    assert bool((follows > expected_responses(grid, everywhere)).all())
    torch.testing.assert_close(
        begun().bound, CAUTION_OF_SEEN * (follows[1] - 1) * x.new_tensor(moved[1]), msg="nothing was seen twice"
    )


def test_the_largest_answer_of_all_waves_counts() -> None:
    """Steps f(x, y) = (3 x, 0): the newest movement is along y, as where a clamp holds the elements that moved last."""

    def stepped(states: Tensor) -> Tensor:
        return states * states.new_tensor([3.0, 0.0])

    x, states = noise(1, 2), noise(4, 1, 2)
    carried = CarriedError(table(6), tuple(range(7)), torch.ones(6, dtype=torch.float64), x)
    for along in ([0.0, 0.0], [0.1, 0.0], [0.0, 0.1]):
        states = states + states.new_tensor(along)
        carried.see(0, states, stepped(states))
    carried.slide(np.array([[0.0], [0.1], [0.0]]))
    torch.testing.assert_close(carried.bound, CAUTION_OF_SEEN * x.new_tensor([3 * (3 - 1) * 0.1]))


@pytest.mark.parametrize("name", ["clipped", "multistep", "40-modes"])
def test_parasolver_keeps_to_the_tolerance_of_the_call(name: str) -> None:
    """By its published bounds it takes as many waves for every tolerance: 12 of 32 "40-modes" are then beyond 4e-4."""
    problem = {
        "clipped": sharp.clipped(32, seed=3),
        "multistep": sharp.modes(32, seed=3, scheduler=sharp.multistep),
        "40-modes": sharp.modes(32, 40, 32, 0.2, seed=3),
    }[name]
    expected, waves = problem.sequential(25), []
    for tolerance in (4e-2, 4e-4):
        found = problem.sampled(25, method="parasolver", tolerance=tolerance)
        beyond = (found.sample - expected).abs().mean(1) > tolerance
        assert int(beyond.sum()) <= 1
        waves.append(found.report.waves)
    assert waves[0] < waves[1] <= 25


def test_the_tolerance_of_the_call_is_filled_in() -> None:
    def filled(method: Any, **asked: Any) -> Any:
        return choose(50, Settings(method=method, **asked)).options

    assert filled("paradigms", tolerance=1e-2).tolerance == 1e-2
    assert filled(ParaDiGMS(tolerance=1e-3), tolerance=1e-2).tolerance == 1e-3
    assert filled(ParaDiGMS.published(), tolerance=1e-2) == ParaDiGMS(step_tolerance=0.1)
    for untouched in (filled("paradigms", exact=True), filled("paradigms", tolerance=0)):
        assert untouched == ParaDiGMS()
    assert filled(ParaDiGMS(window=None)) == ParaDiGMS(window=None)
    assert filled("parasolver", tolerance=1e-2).tolerance == 1e-2
    assert filled(ParaSolver.published(), tolerance=1e-2) == ParaSolver(step_tolerance=0.05)
    assert filled("parasolver", exact=True) == ParaSolver()
