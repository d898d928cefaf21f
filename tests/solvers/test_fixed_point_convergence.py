"""Fixed-point methods: how fast they come to their limit, from which guess, and what windows leave."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cores import Denoiser, assert_close, feed, table
from diffusers import DDPMScheduler
from fixed_points import FORMS, forms, inputs_of, states, sweeps_of, waves_until
from problems import noise, scheduler
from samplers import DIMENSIONS, MIXTURE, SAMPLERS, mixture
from thinned import thinned_product
from torch import Tensor

from srds_fast import sample
from srds_fast.schedulers.table import NoiseTable
from srds_fast.solvers.contract import NO_INPUTS, Checkpoint, Core, SolverInputs, Trajectory
from srds_fast.solvers.fixed_point.grid import responses
from srds_fast.solvers.fixed_point.options import FixedPoint, ParaTAA
from srds_fast.solvers.fixed_point.solver import fixed_point


def gaussian(grid: NoiseTable, data_std: float, prediction: str = "epsilon") -> Denoiser:
    """The optimal network for data N(0, data_std^2), at the noise levels of a table."""
    level = {int(t): i for i, t in enumerate(grid.timesteps)}

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        index = [level[int(each)] for each in t]
        alpha, sigma = grid.alpha[index, None], grid.sigma[index, None]
        x0 = alpha * data_std**2 / (alpha**2 * data_std**2 + sigma**2) * x
        return x0 if prediction == "sample" else (x - alpha * x0) / sigma

    return denoiser


ONE_SWEEP = {
    "ddim": (scheduler(), 0.0),
    "ddim-x0": (scheduler(prediction_type="sample"), 0.0),
    "ddim-eta": (scheduler(), 1.0),
    "ddpm": (DDPMScheduler(clip_sample=False), 0.0),
}


@pytest.mark.parametrize("data_std", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("name", ONE_SWEEP)
def test_one_sweep_is_enough_for_the_data_it_is_made_for(name: str, data_std: float) -> None:
    """From nothing, and from what the network makes of other noise."""
    stock, eta = ONE_SWEEP[name]
    grid, x = table(40, stock, eta), noise(2, DIMENSIONS)
    network = gaussian(grid, data_std, stock.config.prediction_type)
    inputs = inputs_of(x, grid)
    expected = states(network, x, grid, inputs)[-1]
    for guess in (None, states(network, noise(2, DIMENSIONS, seed=9), grid, inputs)):
        options = ParaTAA(data_std=data_std)
        given = SolverInputs(draws=inputs.draws, initial_guess=guess)
        core = fixed_point(x, grid, sweeps_of(40, options, 1), options, given)
        assert_close(feed(core, network, grid)[0], expected, 1e-10)


@pytest.mark.parametrize("name", ["ddim", "ddim-eta", "ddpm-unclipped", "euler", "euler-ancestral", "flow"])
@pytest.mark.parametrize("data_std", [0.3, 1.0, 5.0, math.inf])
def test_the_response_of_a_step_is_its_derivative(name: str, data_std: float) -> None:
    """Of the table's own step, with the x0 that is optimal for such data."""
    stock, _, eta = SAMPLERS[name]
    grid = table(9, stock, eta)
    response, c = responses(grid, data_std)
    for index in range(9):
        alpha, sigma = float(grid.alpha[index]), float(grid.sigma[index])
        precision = 0.0 if math.isinf(data_std) else data_std**-2
        gain = 0.0 if alpha == 0.0 else alpha / (alpha**2 + sigma**2 * precision)

        def step(x: float, index: int = index, gain: float = gain) -> Tensor:
            state = torch.tensor([x], dtype=torch.float64)
            return grid.step(index, state, (gain - grid.p[index]) / grid.q[index] * state)[0]

        assert_close(response[index], torch.tensor(gain, dtype=torch.float64), 1e-12)
        assert_close(c[index : index + 1], step(2.0) - step(1.0), 1e-9)


@pytest.mark.parametrize("options", [ParaTAA(), FORMS["paradigms-whole"]], ids=["parataa", "paradigms-whole"])
def test_no_sample_stops_on_its_way_to_another_component(options: FixedPoint) -> None:
    """Where the mixture parts, the last point rests in a wrong component while points before it still turn."""
    x = noise(64, DIMENSIONS, seed=5)
    expected = sample(MIXTURE, x, scheduler(), 60, method="sequential").sample
    found = sample(MIXTURE, x, scheduler(), 60, method=options)
    assert all(found.report.converged)
    assert found.report.waves < 30
    # components lie 0.8 and more apart
    assert float((found.sample - expected).abs().mean(1).max()) < 0.05


@pytest.mark.parametrize("name", ["ddim", "euler", "flow"])
def test_the_change_is_that_of_the_point_that_moved_most(name: str) -> None:
    """In standard deviations of the points, whatever the scale of the schedule; of the last one as it is."""
    stock, denoiser, _ = SAMPLERS[name]
    grid, options = table(20, stock), ParaTAA()
    x = noise(2, DIMENSIONS) * float(getattr(stock, "init_noise_sigma", 1.0))
    trajectory = Trajectory(20)
    level = (grid.alpha**2 + grid.sigma**2).sqrt()
    before: list[Tensor] = []

    def keep(checkpoint: Checkpoint) -> None:
        points = torch.stack([state for state in trajectory.x[1:] if state is not None])
        if before:
            moved = (points - before.pop()).abs().mean(2) / torch.cat([level[1:], level.new_ones(1)])[:, None]
            assert checkpoint.change is not None
            assert bool((checkpoint.change >= moved[-1]).all())
            torch.testing.assert_close(checkpoint.change, moved.amax(0), rtol=1e-3, atol=1e-12)
        before.append(points)

    inputs = SolverInputs(trajectory=trajectory, scaled=True)
    feed(fixed_point(x, grid, sweeps_of(20, options), options, inputs), denoiser, grid, keep)


def residuals(trajectory: Trajectory, x: Tensor, grid: NoiseTable, inputs: SolverInputs = NO_INPUTS) -> Tensor:
    """Root mean square of what each step of a trajectory misses, [N, samples]."""
    found = []
    departs = x
    for index, arrives in enumerate(trajectory.x[1:]):
        assert arrives is not None
        z = None if inputs.draws is None else inputs.draws[index]
        stepped, _ = grid.step(index, departs, mixture(departs, grid.timesteps[index].expand(len(x))), z=z)
        found.append((arrives - stepped).square().mean(1).sqrt())
        departs = arrives
    return torch.stack(found)


@pytest.mark.parametrize(
    ("window", "form", "name", "step_tolerance"),
    thinned_product([4, 15, 100], ["default", "published", "order"], ["ddim", "ddpm"], [1e-2, 1e-4]),
)
def test_a_window_leaves_no_larger_residual(form: str, name: str, window: int, step_tolerance: float) -> None:
    how: dict[str, Any] = {"window": window, "step_tolerance": step_tolerance}
    options = {
        "default": ParaTAA(**how),
        "published": ParaTAA.published(**how),
        "order": ParaTAA.published(order=5, **how),
    }[form]
    stock, denoiser, eta = SAMPLERS[name]
    grid, x = table(60, stock, eta), noise(2, DIMENSIONS, seed=2)
    inputs = inputs_of(x, grid)
    core = fixed_point(x, grid, sweeps_of(60, options), options, inputs)
    found, waves, checkpoints = feed(core, denoiser, grid)
    assert len(waves) < 60
    starts = [wave.positions[0] for wave in waves]
    assert starts == sorted(set(starts))
    for wave in waves:
        first = wave.positions[0]
        assert wave.positions == tuple(range(first, min(first + window, 60)))
    (checkpoint,) = checkpoints
    assert checkpoint.error is not None
    error = (found - states(denoiser, x, grid, inputs_of(x, grid))[-1]).abs().mean(1)
    assert bool((error <= checkpoint.error).all())
    assert inputs.trajectory is not None
    assert torch.equal(found, inputs.trajectory.x[-1])
    assert float(residuals(inputs.trajectory, x, grid, inputs).max()) <= step_tolerance * (1 + 1e-9)


@forms
def test_a_related_sample_is_a_good_guess(options: FixedPoint) -> None:
    grid, x = table(50), noise(2, DIMENSIONS)
    expected = states(MIXTURE, x, grid)[-1]
    related = states(MIXTURE, x + 1e-3 * noise(2, DIMENSIONS, seed=1), grid)

    def core(guess: Tensor | None) -> Core:
        return fixed_point(x, grid, sweeps_of(50, options), options, SolverInputs(initial_guess=guess))

    if options.window is None:
        warm, cold = (waves_until(1e-3, core(guess), MIXTURE, grid, expected) for guess in (related, None))
    else:
        warm, cold = (len(feed(core(guess), MIXTURE, grid)[1]) for guess in (related, None))
    assert warm < cold


@forms
def test_a_guess_that_is_the_answer_stands_still(options: FixedPoint) -> None:
    """To the bit, where the network does not tell rows apart: nothing moves, and windows slide by all they hold."""
    grid, x = table(14), noise(2, DIMENSIONS)
    trajectory = Trajectory(14)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return 0.25 * x

    core = fixed_point(x, grid, sweeps_of(14, options), options, SolverInputs(trajectory=trajectory), bitwise=True)
    expected, _, _ = feed(core, network, grid)
    guess = torch.stack([x, *(state for state in trajectory.x if state is not None)])
    stood = []

    def keep(checkpoint: Checkpoint) -> tuple[int, ...]:
        stood.append(checkpoint.stationary is None or bool(checkpoint.stationary.all()))
        return ()

    core = fixed_point(x, grid, sweeps_of(14, options), options, SolverInputs(initial_guess=guess), bitwise=True)
    found, waves, _ = feed(core, network, grid, keep)
    assert torch.equal(found, expected)
    assert stood == [True]
    assert len(waves) == math.ceil(14 / (options.window or 14))
