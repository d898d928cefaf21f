"""Collocation: nodes and cover, secants with known answers, exact points, and what the estimated error sees."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cores import Denoiser, assert_close, feed, table
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from fixed_points import inputs_of, states, waves_until
from hypothesis import given
from hypothesis import strategies as st
from problems import GaussianMixture, LinearOde, noise, scheduler
from samplers import DIMENSIONS, MIXTURE, SAMPLERS, mixture, run
from torch import Tensor

from srds_fast import InvalidArgument, sample
from srds_fast.kernels.secant_sweep.reference import inverse
from srds_fast.schedulers.steps import TensorSpec
from srds_fast.schedulers.table import NoiseTable
from srds_fast.solvers.collocation.nodes import FULL_FROM, cover, secant_sweeps, skeleton
from srds_fast.solvers.collocation.options import Collocation
from srds_fast.solvers.collocation.solver import Points
from srds_fast.solvers.collocation.table import cubic, secant_table
from srds_fast.solvers.contract import NO_INPUTS, Checkpoint, Core, SolverInputs
from srds_fast.solvers.convergence import SECANTS, estimated_error
from srds_fast.solvers.fixed_point.program import Sweeps

FORMS = {
    "default": Collocation(),
    "nodes": Collocation(num_nodes=6),
    "uncovered": Collocation(num_nodes=5, cover=None),
    "response": Collocation(num_nodes=6, history=0),
    "history": Collocation(num_nodes=6, cover=2, history=5),
}
forms = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


def program_of(num_steps: int, options: Collocation, iterations: int | None = None) -> Sweeps:
    return secant_sweeps(num_steps, iterations or num_steps, options.num_nodes, options.cover)


def core(
    x: Tensor,
    grid: NoiseTable,
    options: Collocation,
    inputs: SolverInputs = NO_INPUTS,
    iterations: int | None = None,
    *,
    bitwise: bool = False,
) -> Core:
    return options.core(x, grid, program_of(grid.num_steps, options, iterations), inputs, bitwise=bitwise)


# nodes


@pytest.mark.parametrize(("num_steps", "nodes", "share"), [(25, 15, 5), (50, 18, 16), (100, 28, 24), (200, 34, 56)])
def test_nodes_and_cover_by_the_number_of_steps(num_steps: int, nodes: int, share: int) -> None:
    found = skeleton(num_steps)
    assert len(found) == nodes
    assert max(len(each) for each in cover(num_steps, found).values()) == share


@given(st.integers(1, 400), st.none() | st.integers(5, 40), st.none() | st.integers(1, 4))
def test_every_wave_has_the_skeleton_and_every_point_its_turn(
    num_steps: int, num_nodes: int | None, every: int | None
) -> None:
    iterations = min(num_steps, FULL_FROM + 2)
    found = secant_sweeps(num_steps, iterations, num_nodes, every)
    nodes = set(skeleton(num_steps, num_nodes))
    assert {0, num_steps - 1} <= nodes <= set(range(num_steps))
    seen: set[int] = set()
    for number, positions in enumerate(found.positions):
        assert list(positions) == sorted(set(positions))
        assert positions[0] == number
        assert {node for node in nodes if node >= number} <= set(positions) <= set(range(num_steps))
        if number >= FULL_FROM:
            assert positions == tuple(range(number, num_steps))
        else:
            # a point beside the skeleton is visited once, but for the first point of a wave
            assert not (set(positions[1:]) - nodes) & seen
        seen |= set(positions)
    if every == 1 and iterations > 3:
        assert seen == set(range(num_steps))
    assert found.final_steps == (*range(1, iterations), num_steps)


def test_some_of_the_cover_is_spread_over_the_grid() -> None:
    nodes = skeleton(100)
    whole, third = (sorted(sum(cover(100, nodes, every).values(), ())) for every in (1, 3))
    assert len(third) == pytest.approx(len(whole) / 3, abs=1)
    assert set(third) < set(whole)
    assert cover(100, nodes, None) == {}


# exactness


@st.composite
def any_options(draw: st.DrawFn) -> Collocation:
    return Collocation(
        num_nodes=draw(st.none() | st.integers(5, 12)),
        cover=draw(st.none() | st.integers(1, 3)),
        data_std=draw(st.sampled_from(["auto", 0.3, 1.0, 2, math.inf])),
        history=draw(st.integers(0, 5)),
        regularisation=draw(st.sampled_from([1e-8, 1e-3, 1.0])),
    )


@given(st.sampled_from(sorted(SAMPLERS)), any_options(), st.integers(1, 25), st.data())
def test_exact_for_any_options(name: str, options: Collocation, num_steps: int, data: st.DataObject) -> None:
    shared = {"num_steps": num_steps, "batch": data.draw(st.integers(1, 3)), "seed": data.draw(st.integers(0, 99))}
    max_rows = data.draw(st.sampled_from([None, 1, 2, 5]))
    found = run(name, **shared, method=options, exact=True, max_rows=max_rows)
    assert_close(found, run(name, **shared, method="sequential"), 1e-10)


@forms
@pytest.mark.parametrize("name", ["ddim", "ddim-clip", "ddpm", "ddim-eta", "dpm", "euler", "flow"])
def test_every_wave_makes_one_more_point_exact(name: str, options: Collocation) -> None:
    stock, denoiser, eta = SAMPLERS[name]
    grid = table(20, stock, eta)
    x = noise(2, DIMENSIONS) * float(getattr(stock, "init_noise_sigma", 1.0))
    inputs = inputs_of(x, grid)
    expected = states(denoiser, x, grid, inputs)
    assert inputs.trajectory is not None
    trajectory, seen = inputs.trajectory.x, []

    def keep(checkpoint: Checkpoint) -> None:
        done = checkpoint.iteration
        assert_close(torch.stack([x for x in trajectory[1 : done + 1] if x is not None]), expected[1 : done + 1], 1e-12)
        seen.append((done, checkpoint.exact))

    found, waves, _ = feed(core(x, grid, options, inputs), denoiser, grid, keep)
    assert seen == [(iteration, iteration == 20) for iteration in range(1, 21)]
    assert_close(found, expected[-1], 1e-12)
    for wave in waves:
        assert_close(wave.x[0], expected[wave.positions[0]], 1e-12)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-4])
def test_small_tolerances_are_kept_by_waves_of_all_points(tolerance: float) -> None:
    x = noise(8, DIMENSIONS)
    expected = sample(MIXTURE, x, scheduler(), 60, method="sequential").sample
    found = sample(MIXTURE, x, scheduler(), 60, method="collocation", tolerance=tolerance)
    assert float((found.sample - expected).abs().mean(1).max()) <= tolerance
    assert FULL_FROM < found.report.waves < 20


def broken_far_out(x: Tensor, t: Tensor) -> Tensor:
    """NaN where a state is too large, as a network in half precision gives."""
    return torch.where(x.abs().amax(1, keepdim=True) > 50, math.nan, mixture(x, t))


@forms
@pytest.mark.parametrize("stock", [None, DPMSolverMultistepScheduler()], ids=["ddim", "dpm"])
def test_what_is_not_finite_goes_forwards_only(stock: Any, options: Collocation) -> None:
    """Points far out make the network fail there; those before them still become exact, one by one."""
    grid, x = table(10, stock), noise(2, DIMENSIONS)
    guess = 1e3 * noise(11, 2, DIMENSIONS, seed=1, dtype=torch.float32)
    found, waves, _ = feed(core(x, grid, options, SolverInputs(initial_guess=guess)), broken_far_out, grid)
    assert len(waves) == 10
    assert_close(found, states(mixture, x, grid)[-1], 1e-12)


def test_a_guess_that_is_the_answer_stands_still() -> None:
    """To the bit, where all points are asked."""
    options, grid, x = Collocation(), table(12), noise(2, DIMENSIONS)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return 0.25 * x

    inputs = inputs_of(x, grid)
    assert inputs.trajectory is not None
    expected = feed(core(x, grid, options, inputs, bitwise=True), network, grid)[0]
    guess = torch.stack([x, *(state for state in inputs.trajectory.x if state is not None)])
    stood = []

    def keep(checkpoint: Checkpoint) -> tuple[int, ...]:
        assert checkpoint.stationary is not None
        stood.append(bool(checkpoint.stationary.all()))
        return ()

    answer = feed(core(x, grid, options, SolverInputs(initial_guess=guess), bitwise=True), network, grid, keep)[0]
    assert torch.equal(answer, expected)
    assert stood == [True]


def test_nothing_is_stationary_where_points_are_interpolated() -> None:
    found = feed(core(noise(1, DIMENSIONS), table(60), Collocation(), iterations=10, bitwise=True), MIXTURE, table(60))
    looked = [checkpoint.stationary for checkpoint in found[2]]
    assert all(each is not None and not bool(each.any()) for each in looked[:FULL_FROM])


# known answers


def gaussian(grid: NoiseTable, data_std: float) -> Denoiser:
    """What the network of a table says for data N(0, data_std^2)."""
    level = {float(t): i for i, t in enumerate(grid.timesteps)}

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        i = [level[float(each)] for each in t]
        alpha, sigma, p, q, scale = (
            each[i, None] for each in (grid.alpha, grid.sigma, grid.p, grid.q, grid.input_scale)
        )
        state = x / scale
        return (alpha * data_std**2 / (alpha**2 * data_std**2 + sigma**2) * state - p * state) / q

    return denoiser


KINDS: dict[str, tuple[Any, float]] = {
    "ddim": (scheduler(), 0.0),
    "ddim-x0": (scheduler(prediction_type="sample"), 0.0),
    "ddim-v": (scheduler(prediction_type="v_prediction"), 0.0),
    "ddim-eta": (scheduler(), 1.0),
    "ddpm": (DDPMScheduler(clip_sample=False), 0.0),
    "dpm": (DPMSolverMultistepScheduler(), 0.0),
    "euler": (EulerDiscreteScheduler(), 0.0),
    "flow": (FlowMatchEulerDiscreteScheduler(), 0.0),
}


@pytest.mark.parametrize("data_std", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("name", KINDS)
def test_one_sweep_is_enough_for_the_data_it_is_made_for(name: str, data_std: float) -> None:
    """Also for multistep schedulers, whose momentum the sweep carries, and from what is made of other noise."""
    stock, eta = KINDS[name]
    grid, options = table(40, stock, eta), Collocation(data_std=data_std)
    x = noise(2, DIMENSIONS) * float(getattr(stock, "init_noise_sigma", 1.0))
    network, inputs = gaussian(grid, data_std), inputs_of(x, grid)
    expected = states_scaled(network, x, grid, inputs)[-1]
    given = SolverInputs(draws=inputs.draws, scaled=True)
    assert_close(feed(core(x, grid, options, given, 1), network, grid)[0], expected, 1e-9)


def states_scaled(network: Denoiser, x: Tensor, grid: NoiseTable, inputs: SolverInputs) -> Tensor:
    """`states` for networks whose input is scaled."""
    scale = {float(t): s for t, s in zip(grid.timesteps, grid.input_scale.tolist(), strict=True)}
    return states(lambda x, t: network(x * scale[float(t[0])], t), x, grid, inputs)


def test_a_guess_from_other_noise_takes_one_sweep_too() -> None:
    grid, x = table(40), noise(2, DIMENSIONS)
    network = gaussian(grid, 0.6)
    guess = states(network, noise(2, DIMENSIONS, seed=9), grid)
    found = feed(core(x, grid, Collocation(), SolverInputs(initial_guess=guess), 1), network, grid)[0]
    assert_close(found, states(network, x, grid)[-1], 1e-9)


def test_a_linear_problem_is_solved_in_few_waves() -> None:
    """Data of any covariance: the response is a matrix, which secants learn as far as the points move along it."""
    data, x = LinearOde.random(4), noise(3, 4)
    grid = table(50)
    expected = states(data, x, grid)[-1]
    assert waves_until(4e-3, core(x, grid, Collocation()), data, grid, expected) <= 4
    assert waves_until(4e-3, core(x, grid, Collocation(history=0)), data, grid, expected) > 4


@pytest.mark.parametrize("num_steps", [25, 100, 400])
def test_as_many_waves_for_any_number_of_steps(num_steps: int) -> None:
    x = noise(16, DIMENSIONS)
    expected = sample(MIXTURE, x, scheduler(), num_steps, method="sequential").sample
    found = sample(MIXTURE, x, scheduler(), num_steps, method="collocation")
    assert float((found.sample - expected).abs().mean(1).max()) <= 4e-3
    assert max(found.report.iterations_per_sample) <= 11
    assert found.report.rows < 5.5 * num_steps + 100


@pytest.mark.parametrize("name", ["ddim", "ddim-clip", "ddpm", "ddim-eta", "dpm", "euler", "flow"])
def test_secants_take_fewer_waves_than_responses_alone(name: str) -> None:
    stock, denoiser, eta = SAMPLERS[name]
    grid = table(50, stock, eta)
    x = noise(4, DIMENSIONS) * float(getattr(stock, "init_noise_sigma", 1.0))
    inputs = inputs_of(x, grid)
    expected = states(denoiser, x, grid, inputs)[-1]
    given = SolverInputs(draws=inputs.draws)
    with_secants, without = (
        waves_until(1e-3, core(x, grid, options, given), denoiser, grid, expected)
        for options in (Collocation(), Collocation(history=0))
    )
    assert with_secants <= without


def test_small_systems_are_inverted() -> None:
    factor = noise(7, 3, 4, 4)
    matrix = factor @ factor.transpose(-1, -2) + 0.1 * torch.eye(4, dtype=torch.float64)
    assert_close(inverse(matrix) @ matrix, torch.eye(4, dtype=torch.float64).expand_as(matrix), 1e-9)


# the estimated error


def test_a_stop_by_the_newest_ratio_or_the_mean_of_two() -> None:
    assert math.isinf(estimated_error([1.0, 0.1, 0.01], SECANTS)), "some points were never asked"
    assert estimated_error([1.0, 0.1, 0.01, 0.001], SECANTS) == pytest.approx(0.001 * 0.6 / 0.4), "they have just been"
    assert estimated_error([1.0, 0.9, 0.9, 0.45], SECANTS) == pytest.approx(0.45 * 0.9 / 0.1), "with caution"
    assert estimated_error([2.0, 1.0, 1.0, 0.8, 0.16], SECANTS) == pytest.approx(0.16 * 0.4 / 0.6), "the mean of both"
    assert estimated_error([2.0, 1.0, 0.1, 0.01, 0.006], SECANTS) == pytest.approx(0.006 * 0.6 / 0.4)
    assert estimated_error([2.0, 1.0, 0.1, 0.01, 0.001], SECANTS) == pytest.approx(0.001 * 0.3 / 0.7)
    assert estimated_error([2.0, 1.0, 1.0, 0.1, 0.5], SECANTS) == pytest.approx(9 * 0.5)
    assert estimated_error([1.0, 0.5, 0.0], SECANTS) == 0.0
    assert estimated_error([10.0**-wave for wave in range(9)], SECANTS) == pytest.approx(1e-8 * 0.6 / 0.4), "all points"


def test_loose_tolerances_are_kept_where_samples_turn_late() -> None:
    """Narrow Gaussians in few dimensions: in the third wave, all points have not been asked yet."""
    beyond = 0
    for seed in range(2):
        narrow = GaussianMixture.random(8, 40, seed)
        narrow = GaussianMixture((narrow.means / 1.7).clamp(-1, 1), 0.2)
        x = noise(256, 8, seed=seed)
        expected = sample(narrow, x, scheduler(), 50, method="sequential").sample
        found = sample(narrow, x, scheduler(), 50, method="collocation", tolerance=4e-2)
        beyond += int(((found.sample - expected).abs().mean(1) > 4e-2).sum())
    assert beyond <= 3


def test_what_no_change_shows_counts_where_it_is_larger() -> None:
    assert estimated_error([0.48, 0.24, 0.12, 0.06, 0.03], SECANTS, 0.04) == pytest.approx(0.04)
    assert estimated_error([0.48, 0.24, 0.12, 0.06, 0.03], SECANTS, 0.02) == pytest.approx(0.03)
    assert estimated_error([1.0, 0.5, 0.0], SECANTS, 0.04) == 0.04
    assert math.isinf(estimated_error([1.0, 0.5], SECANTS, 0.04))


def test_samples_that_turn_late_are_not_stopped_at_rest() -> None:
    """Where points move far after the cover was visited, what was found there is stale, and no change shows it."""
    x = noise(96, DIMENSIONS, seed=5)
    expected = sample(MIXTURE, x, scheduler(), 60, method="sequential").sample
    found = sample(MIXTURE, x, scheduler(), 60, method="collocation")
    assert all(found.report.converged)
    error = (found.sample - expected).abs().mean(1)
    assert int((error > 4e-3).sum()) <= 2
    assert float(error.max()) < 0.02


def test_doubts_are_of_points_that_were_interpolated() -> None:
    grid, x, options = table(60), noise(2, DIMENSIONS), Collocation()
    program = program_of(60, options, 10)
    how = options.data_std, options.history, options.regularisation
    points = Points(x, grid, secant_table(grid, program, *how, TensorSpec.of(x), scaled=False), NO_INPUTS)
    for number, positions in enumerate(program.positions):
        wave = points.evaluate(number, positions)
        t = grid.timesteps[list(positions)].repeat_interleave(2)
        points.sweep(number, MIXTURE(wave.x.flatten(0, 1), t).view_as(wave.x), bitwise=False)
        doubts = points._memory.doubts
        assert bool((doubts[list(positions)] == 0).all())
        assert bool((doubts >= 0).all())
        assert bool((doubts == 0).all()) == (number >= FULL_FROM)


@pytest.mark.parametrize("max_rows", [1, 3, 5])
def test_narrow_waves_change_nothing_but_their_number(max_rows: int) -> None:
    whole, narrow = (
        sample(MIXTURE, noise(2, DIMENSIONS), scheduler(), 30, method="collocation", max_rows=most)
        for most in (None, max_rows)
    )
    assert_close(narrow.sample, whole.sample, 1e-12)
    assert narrow.report.peak_rows <= max_rows < whole.report.peak_rows
    assert narrow.report.waves > whole.report.waves
    assert (narrow.report.rows, narrow.report.iterations) == (whole.report.rows, whole.report.iterations)


def test_a_related_sample_is_a_good_guess() -> None:
    grid, x = table(50), noise(2, DIMENSIONS)
    expected = states(MIXTURE, x, grid)[-1]
    related = states(MIXTURE, x + 1e-3 * noise(2, DIMENSIONS, seed=1), grid)
    warm, cold = (
        waves_until(1e-3, core(x, grid, Collocation(), SolverInputs(initial_guess=guess)), MIXTURE, grid, expected)
        for guess in (related, None)
    )
    assert warm < cold


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_noise_may_lie_in_memory_in_any_way(layout: str) -> None:
    x = noise(2, 3, 4, 5)
    other = x.transpose(1, 3).contiguous().transpose(1, 3) if layout == "transposed" else x[:1].expand(2, 3, 4, 5)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return x.sin() * (t.to(x) / 1000)[:, None, None, None]

    expected, found = (
        sample(denoiser, given, scheduler(), 9, method="collocation").sample
        for given in (other.clone(memory_format=torch.contiguous_format), other)
    )
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_state_is_wider_than_what_the_network_sees(dtype: torch.dtype) -> None:
    given = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        given.append(x.dtype)
        return MIXTURE(x.double(), t).to(dtype)

    x = noise(2, DIMENSIONS, dtype=dtype)
    found = sample(denoiser, x, scheduler(), 8, method="collocation", exact=True).sample
    assert set(given) == {dtype}
    expected = sample(denoiser, x, scheduler(), 8, method="sequential").sample
    assert_close(found.double(), expected.double(), 0.02)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_nodes": 4}, "num_nodes is 4. It must be a whole number, 5 or more"),
        ({"cover": 0}, "cover is 0. It must be a whole number, 1 or more"),
        ({"history": 6}, "history is 6. It must be a whole number, 0 to 5"),
        ({"data_std": 0}, "data_std is 0. It must be a positive number"),
        ({"regularisation": math.inf}, "regularisation is inf"),
    ],
    ids=str,
)
def test_bad_options_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        Collocation(**given)


@st.composite
def descending(draw: st.DrawFn) -> Tensor:
    gaps = draw(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=14))
    return -torch.tensor(gaps, dtype=torch.float64).cumsum(0)


@given(descending(), st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 99))
def test_what_is_carried_between_nodes_is_exact_for_cubics(nodes: Tensor, where: list[float], seed: int) -> None:
    points = nodes[0] + (nodes[-1] - nodes[0]) * torch.tensor(where, dtype=torch.float64)
    weights = cubic(nodes, points)
    assert weights.shape == (len(points), len(nodes))
    assert int((weights != 0).sum(1).max()) <= 4
    degree = min(4, len(nodes))
    polynomial = torch.randn(degree, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    powers = torch.arange(degree)
    # in the middle of the nodes, where powers are small
    middle = nodes.mean()
    at_nodes, at_points = ((each - middle)[:, None] ** powers @ polynomial for each in (nodes, points))
    scale = float((weights.abs() @ at_nodes.abs()).max())
    torch.testing.assert_close(weights @ at_nodes, at_points, rtol=0, atol=1e-9 * max(1.0, scale))
    torch.testing.assert_close(weights.sum(1), torch.ones_like(points), rtol=0, atol=1e-9 * float(weights.abs().max()))
    torch.testing.assert_close(cubic(nodes, nodes), torch.eye(len(nodes), dtype=torch.float64))
