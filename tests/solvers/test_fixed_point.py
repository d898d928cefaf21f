"""Fixed-point methods: the sequential sampler at their limit, point by point, and how fast they get there."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from cores import feed, one_by_one, table
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from problems import LinearOde, noise, scheduler
from samplers import DIMENSIONS, MIXTURE, SAMPLERS, Denoiser, mixture, run
from thinned import thinned_product
from torch import Tensor

from srds_fast import InvalidArgument, Report, sample
from srds_fast.sampling.rows import draw_noise
from srds_fast.schedulers.table import NoiseTable
from srds_fast.solvers.contract import NOTHING, Checkpoint, Core, Extras, Trajectory
from srds_fast.solvers.fixed_point import program as sweeps
from srds_fast.solvers.fixed_point.grid import interpolation, responses
from srds_fast.solvers.fixed_point.options import Collocation, FixedPoint, ParaDiGMS, ParaTAA
from srds_fast.solvers.fixed_point.program import Sweeps
from srds_fast.solvers.fixed_point.solver import fixed_point

LINEAR = LinearOde.random(DIMENSIONS)

# all that a sweep does differently for some options
FORMS: dict[str, FixedPoint] = {
    "collocation": Collocation(num_nodes=6),
    "collocation-picard": Collocation(num_nodes=5, data_std=None, history=0),
    "parataa": ParaTAA(),
    "parataa-order": ParaTAA(order=3, history=5, data_std=math.inf),
    "parataa-window": ParaTAA(window=7, step_tolerance=1e-3),
    "parataa-published": ParaTAA.published(window=6, order=4),
    "paradigms": ParaDiGMS(window=5),
    "paradigms-whole": ParaDiGMS(window=None, step_tolerance=None),
}
forms = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


def assert_close(found: Tensor, expected: Tensor, relative: float) -> None:
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= relative * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name_and_end", "form"), thinned_product(product(SAMPLERS, [{"exact": True}, {"tolerance": 0.0}]), FORMS), ids=str
)
def test_run_to_the_end_they_are_sequential(name_and_end: tuple[str, dict[str, Any]], form: str) -> None:
    (name, end), options = name_and_end, FORMS[form]
    for num_steps in (1, 2, 3, 5, 17):
        expected = run(name, num_steps, method="sequential")
        assert_close(run(name, num_steps, method=options, **end), expected, 1e-10)
    expected = run(name, 25, dtype=torch.float32, method="sequential")
    assert_close(run(name, 25, dtype=torch.float32, method=options, **end), expected, 1e-5)


@st.composite
def any_options(draw: st.DrawFn) -> FixedPoint:
    shared = {
        "data_std": draw(st.sampled_from([None, 0.3, 1.0, 2, math.inf])),
        "history": draw(st.integers(0, 5)),
        "regularisation": draw(st.sampled_from([1e-8, 1e-3, 1.0])),
    }
    if draw(st.booleans()):
        return Collocation(num_nodes=draw(st.integers(sweeps.FEWEST_NODES, 12)), **shared)
    order = draw(st.none() | st.integers(1, 12))
    if draw(st.booleans()):
        return ParaTAA(order=order, **shared)
    cls = draw(st.sampled_from([ParaTAA, ParaDiGMS]))
    step_tolerance = draw(st.sampled_from([1e-6, 0.1, 10.0]))
    return cls(order=order, window=draw(st.integers(1, 30)), step_tolerance=step_tolerance, **shared)


@given(st.sampled_from(sorted(SAMPLERS)), any_options(), st.integers(1, 25), st.data())
def test_exact_for_any_options(name: str, options: FixedPoint, num_steps: int, data: st.DataObject) -> None:
    shared = {"num_steps": num_steps, "batch": data.draw(st.integers(1, 3)), "seed": data.draw(st.integers(0, 99))}
    max_rows = data.draw(st.sampled_from([None, 1, 2, 5]))
    found = run(name, **shared, method=options, exact=True, max_rows=max_rows)
    assert_close(found, run(name, **shared, method="sequential"), 1e-10)


def test_a_window_of_paradigms_with_history_is_exact() -> None:
    """Points that do not move let the window slide; the mixed point behind them is not a step and stays in it."""
    options = ParaDiGMS(data_std=None, history=1, window=3, step_tolerance=1e-6)
    for seed in (0, 2):
        expected = run("ddim-v", 17, batch=1, seed=seed, method="sequential")
        assert_close(run("ddim-v", 17, batch=1, seed=seed, method=options, exact=True), expected, 1e-10)


@pytest.mark.parametrize("max_rows", [1, 3, 5])
@pytest.mark.parametrize("form", ["collocation", "parataa", "parataa-order", "paradigms-whole"])
def test_narrow_waves_change_nothing_but_their_number(form: str, max_rows: int) -> None:
    def result(**how: Any) -> tuple[Tensor, Report]:
        found = sample(MIXTURE, noise(2, DIMENSIONS), scheduler(), 30, method=FORMS[form], **how)
        return found.sample, found.report

    whole, expected = result()
    narrow, report = result(max_rows=max_rows)
    assert_close(narrow, whole, 1e-12)
    assert report.peak_rows <= max_rows < expected.peak_rows
    assert report.waves > expected.waves
    assert (report.rows, report.iterations) == (expected.rows, expected.iterations)


@pytest.mark.parametrize("form", ["collocation", "parataa", "parataa-order", "paradigms-whole"])
def test_a_sample_does_not_depend_on_the_others(form: str) -> None:
    # far from the others the mixture is one Gaussian, and the steps know it at once
    shift = torch.tensor([0.0, 100.0, 1.0, 0.1], dtype=torch.float64)[:, None] * noise(1, DIMENSIONS, seed=5)
    x = noise(4, DIMENSIONS)
    settings = {"method": FORMS[form], "tolerance": 1e-5}
    together = sample(MIXTURE, x, scheduler(), 40, cond={"shift": shift}, **settings)
    iterations = together.report.iterations_per_sample
    assert len(set(iterations)) > 1
    assert together.report.evaluations < 4 * together.report.rows
    for one in range(4):
        cond = {"shift": shift[one : one + 1]}
        alone = sample(MIXTURE, x[one : one + 1], scheduler(), 40, cond=cond, **settings)
        assert_close(alone.sample[0], together.sample[one], 1e-10)
        assert alone.report.iterations == iterations[one]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@forms
def test_the_state_is_wider_than_what_the_network_sees(options: FixedPoint, dtype: torch.dtype) -> None:
    given = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        given.append(x.dtype)
        return MIXTURE(x.double(), t).to(dtype)

    x = noise(2, DIMENSIONS, dtype=dtype)
    found = sample(denoiser, x, scheduler(), 8, method=options, exact=True).sample
    assert set(given) == {dtype}
    assert found.dtype == dtype
    expected = sample(denoiser, x, scheduler(), 8, method="sequential").sample
    assert_close(found.double(), expected.double(), 0.02 if dtype == torch.bfloat16 else 0.01)


def sweeps_of(num_steps: int, options: FixedPoint, iterations: int | None = None) -> Sweeps:
    """Nodes and all: of an exact run a plan makes every point a row."""
    if options.window is not None:
        return sweeps.windows(num_steps, options.window)
    return sweeps.fixed_point(num_steps, iterations or num_steps, options.num_nodes)


def states(denoiser: Denoiser, x: Tensor, grid: NoiseTable, extras: Extras = NOTHING) -> Tensor:
    """The sequential trajectory, [N + 1, ...]; step by step as the table defines them."""
    found, x0 = [x], None
    for index in range(grid.num_steps):
        z = None if extras.draws is None else extras.draws[index]
        x, x0 = grid.step(index, x, denoiser(x, grid.timesteps[index].expand(len(x))), x0, z)
        if extras.constrain is not None:
            x = extras.constrain(x, index + 1, tuple(range(len(x))))
        found.append(x)
    return torch.stack(found)


def extras_of(name: str, x: Tensor, grid: NoiseTable) -> Extras:
    draws = draw_noise(grid, x, x.dtype, torch.Generator().manual_seed(3))
    return Extras(draws=draws, trajectory=Trajectory(grid.num_steps))


@pytest.mark.parametrize("form", [name for name, options in FORMS.items() if options.window is None])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "ddim-eta", "dpm"])
def test_after_wave_k_the_first_k_steps_are_exact(name: str, form: str) -> None:
    stock, denoiser, eta = SAMPLERS[name]
    grid, x = table(12, stock, eta), noise(2, DIMENSIONS)
    extras = extras_of(name, x, grid)
    expected = states(denoiser, x, grid, extras)
    assert extras.trajectory is not None
    trajectory = extras.trajectory.x
    seen = []

    def keep(checkpoint: Checkpoint) -> None:
        prefix = torch.stack([state for state in trajectory[1 : checkpoint.iteration + 1] if state is not None])
        assert_close(prefix, expected[1 : checkpoint.iteration + 1], 1e-12)
        seen.append((checkpoint.iteration, checkpoint.exact))

    options = FORMS[form]
    found, waves, _ = feed(fixed_point(x, grid, sweeps_of(12, options), options, extras), denoiser, grid, keep)
    assert seen == [(iteration, iteration == 12) for iteration in range(1, 13)]
    assert_close(found, expected[-1], 1e-12)
    for number, wave in enumerate(waves):
        assert_close(wave.x[0], expected[number], 1e-12)


@pytest.mark.parametrize("form", [name for name, options in FORMS.items() if options.window is not None])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "ddim-eta", "dpm"])
def test_without_tolerance_a_window_begins_at_an_exact_point(name: str, form: str) -> None:
    stock, denoiser, eta = SAMPLERS[name]
    grid, x = table(12, stock, eta), noise(2, DIMENSIONS)
    extras = extras_of(name, x, grid)
    expected = states(denoiser, x, grid, extras)
    options = FORMS[form]
    core = fixed_point(x, grid, sweeps_of(12, options), options, extras, watch_bits=True)
    _, waves, _ = feed(core, denoiser, grid)
    for wave in waves:
        assert_close(wave.x[0], expected[wave.positions[0]], 1e-12)
    assert extras.trajectory is not None
    assert_close(torch.stack([state for state in extras.trajectory.x if state is not None]), expected[1:], 1e-12)


def test_the_trajectory_holds_what_multistep_schedulers_remember() -> None:
    grid, x = table(15, DPMSolverMultistepScheduler()), noise(2, DIMENSIONS)
    ours, theirs = Trajectory(15), Trajectory(15)
    feed(fixed_point(x, grid, sweeps.fixed_point(15, 15, 6), Collocation(), Extras(trajectory=ours)), mixture, grid)
    one_by_one(x, grid, mixture, Extras(trajectory=theirs))
    for found, expected in zip([*ours.x[1:], *ours.x0], [*theirs.x[1:], *theirs.x0], strict=True):
        assert found is not None
        assert expected is not None
        assert_close(found, expected, 1e-10)


def test_a_run_may_begin_in_the_middle_of_a_multistep_grid() -> None:
    whole = table(15, DPMSolverMultistepScheduler())
    rest, x = whole.part(6, 15, afresh=False), noise(2, DIMENSIONS)
    extras = Extras(x0_prev=noise(2, DIMENSIONS, seed=1))
    expected = one_by_one(x, rest, mixture, extras)
    for options in FORMS.values():
        core = fixed_point(x, rest, sweeps_of(9, options), options, extras, watch_bits=True)
        assert_close(feed(core, mixture, rest)[0], expected, 1e-10)


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
@pytest.mark.parametrize("method", [Collocation, ParaTAA])
def test_one_sweep_is_enough_for_the_data_it_is_made_for(method: type[FixedPoint], name: str, data_std: float) -> None:
    """From nothing, and from what the network makes of other noise."""
    stock, eta = ONE_SWEEP[name]
    grid, x = table(40, stock, eta), noise(2, DIMENSIONS)
    network = gaussian(grid, data_std, stock.config.prediction_type)
    extras = extras_of(name, x, grid)
    expected = states(network, x, grid, extras)[-1]
    for guess in (None, states(network, noise(2, DIMENSIONS, seed=9), grid, extras)):
        options = method(data_std=data_std)
        core = fixed_point(x, grid, sweeps_of(40, options, 1), options, Extras(draws=extras.draws, guess=guess))
        assert_close(feed(core, network, grid)[0], expected, 1e-10)


def test_one_sweep_is_enough_for_the_closed_form() -> None:
    """The same through the front door, and no word of the package in what is expected."""
    for data_std in (0.5, 1.0):
        covariance = data_std**2 * torch.eye(4, dtype=torch.float64)
        ode, x = LinearOde(torch.zeros(4, dtype=torch.float64), covariance), noise(2, 4)
        # the schedule is rounded to single precision, and not alike everywhere: what is interpolated sees that
        for method, relative in (
            (Collocation(data_std=data_std, num_nodes=8), 1e-6),
            (ParaTAA(data_std=data_std), 1e-10),
        ):
            found = sample(ode, x, scheduler(), 40, method=method, max_iterations=1)
            expected = sample(ode, x, scheduler(), 40, method="sequential")
            assert (found.report.waves, found.report.iterations) == (1, 1)
            assert_close(found.sample, expected.sample, relative)
            torch.testing.assert_close(found.sample, ode.solution(x, 40), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [Collocation, ParaTAA])
def test_one_sweep_is_enough_for_a_constant_eps(method: type[FixedPoint]) -> None:
    """The linear part alone: data without bounds."""
    grid, x, eps = table(40), noise(2, DIMENSIONS), noise(1, DIMENSIONS, seed=4)[0]

    def network(x: Tensor, t: Tensor) -> Tensor:
        return eps.expand_as(x)

    options = method(data_std=math.inf)
    expected = states(network, x, grid)[-1]
    for guess in (None, states(network, noise(2, DIMENSIONS, seed=9), grid)):
        core = fixed_point(x, grid, sweeps_of(40, options, 1), options, Extras(guess=guess))
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


@st.composite
def descending(draw: st.DrawFn) -> Tensor:
    gaps = draw(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=14))
    return -torch.tensor(gaps, dtype=torch.float64).cumsum(0)


@given(descending(), st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 99))
def test_interpolation_reproduces_cubics(nodes: Tensor, where: list[float], seed: int) -> None:
    points = nodes[0] + (nodes[-1] - nodes[0]) * torch.tensor(where, dtype=torch.float64)
    weights = interpolation(nodes, points)
    assert weights.shape == (len(points), len(nodes))
    assert int((weights != 0).sum(1).max()) <= 4
    degree = min(4, len(nodes))
    cubic = torch.randn(degree, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    powers = torch.arange(degree)
    # in the middle of the nodes, where powers are small
    middle = nodes.mean()
    at_nodes, at_points = ((each - middle)[:, None] ** powers @ cubic for each in (nodes, points))
    scale = float((weights.abs() @ at_nodes.abs()).max())
    torch.testing.assert_close(weights @ at_nodes, at_points, rtol=0, atol=1e-9 * max(1.0, scale))
    torch.testing.assert_close(weights.sum(1), torch.ones_like(points), rtol=0, atol=1e-9 * float(weights.abs().max()))
    torch.testing.assert_close(interpolation(nodes, nodes), torch.eye(len(nodes), dtype=torch.float64))


@given(st.integers(0, 300), st.integers(1, 300), st.integers(sweeps.FEWEST_NODES, 40), st.booleans())
def test_nodes_are_as_many_as_asked_for(first: int, left: int, num_nodes: int, between: bool) -> None:
    num_steps = first + left
    found = sweeps.nodes(first, num_steps, num_nodes, between=between)
    assert list(found) == sorted(set(found))
    assert len(found) == min(num_nodes, left)
    last = range(max(first, num_steps - sweeps.NODES_AT_THE_END), num_steps)
    assert {first, *last} <= set(found)
    assert found[-1] == num_steps - 1


@given(st.integers(0, 50), st.integers(100, 400), st.integers(sweeps.FEWEST_NODES + 1, 20))
def test_every_other_sweep_has_its_nodes_between(first: int, left: int, num_nodes: int) -> None:
    num_steps = first + left
    whole, shifted = (sweeps.nodes(first, num_steps, num_nodes, between=between) for between in (False, True))
    inner = slice(1, -sweeps.NODES_AT_THE_END)
    # the first of the shifted ones lies before the first of the others, and so on; towards the end they come close
    assert all(one <= other for one, other in zip(shifted[inner], whole[inner], strict=True))
    assert all(one < other for one, other in zip(whole[inner], shifted[inner][1:], strict=False))
    assert shifted[1] < whole[1]


def check_sweeps(found: Sweeps, num_steps: int) -> None:
    assert found.positions == tuple(tuple(row.position for row in wave.rows) for wave in found)
    for positions in found.positions:
        assert list(positions) == sorted(set(positions))
        assert 0 <= positions[0] <= positions[-1] < num_steps
    assert list(found.final_steps) == sorted(found.final_steps)
    assert len(found.final_steps) == found.num_waves
    assert found.final_steps[-1] == num_steps


@given(st.integers(1, 60), st.none() | st.integers(sweeps.FEWEST_NODES, 30), st.data())
def test_sweeps_begin_where_nothing_is_exact_yet(num_steps: int, num_nodes: int | None, data: st.DataObject) -> None:
    iterations = data.draw(st.integers(1, num_steps))
    found = sweeps.fixed_point(num_steps, iterations, num_nodes)
    check_sweeps(found, num_steps)
    assert found.num_waves == iterations
    widths = [len(positions) for positions in found.positions]
    for number, positions in enumerate(found.positions):
        assert positions[0] == number
        assert positions[-1] == num_steps - 1
        assert found.spent(number + 1) == (number + 1, sum(widths[: number + 1]), max(widths[: number + 1]))
        left = num_steps - number
        if num_nodes is None or number >= sweeps.MOST_SPARSE_SWEEPS + sweeps.MOST_DENSER_SWEEPS:
            assert widths[number] == left
        else:
            assert widths[number] == min(left, num_nodes * (1 if number < sweeps.MOST_SPARSE_SWEEPS else 2))
    assert found.final_steps[:-1] == tuple(range(1, iterations))
    assert found.num_rows == sum(widths)


@given(st.integers(1, 60), st.none() | st.integers(sweeps.FEWEST_NODES, 30), st.integers(1, 12))
def test_narrow_sweeps_hold_the_same_rows(num_steps: int, num_nodes: int | None, max_rows: int) -> None:
    whole = sweeps.fixed_point(num_steps, num_steps, num_nodes)
    narrow = whole.limited_to(max_rows)
    assert [row for wave in narrow for row in wave.rows] == [row for wave in whole for row in wave.rows]
    assert narrow.peak_rows <= max_rows
    for iteration in range(1, num_steps + 1):
        assert narrow.spent(iteration).rows == whole.spent(iteration).rows


@given(st.integers(1, 60), st.integers(1, 70))
def test_windows_begin_at_every_step(num_steps: int, window: int) -> None:
    found = sweeps.windows(num_steps, window)
    check_sweeps(found, num_steps)
    for first, positions in enumerate(found.positions):
        assert positions == tuple(range(first, min(first + window, num_steps)))
    assert found.spent(num_steps).waves == num_steps


@pytest.mark.parametrize("arguments", [(0, 1), (5, 0), (5, 6), (5, 5, 4)], ids=str)
def test_sweeps_out_of_range_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match="must be a whole number"):
        sweeps.fixed_point(*arguments)


def waves_until(bound: float, core: Core, denoiser: Denoiser, grid: NoiseTable, expected: Tensor) -> int:
    """Sweeps until the mean absolute error of every sample is within a bound."""
    count = 0

    def keep(checkpoint: Checkpoint) -> tuple[int, ...] | None:
        nonlocal count
        count = checkpoint.iteration
        error = (checkpoint.sample - expected).abs().flatten(1).mean(1)
        return () if float(error.max()) <= bound else None

    feed(core, denoiser, grid, keep)
    return count


@pytest.mark.parametrize("num_nodes", [12, 20])
def test_collocation_takes_as_many_waves_for_any_number_of_steps(num_nodes: int) -> None:
    options, x = Collocation(num_nodes=num_nodes), noise(4, DIMENSIONS)
    for num_steps in (25, 100, 400):
        grid = table(num_steps)
        expected = states(MIXTURE, x, grid)[-1]
        core = fixed_point(x, grid, sweeps_of(num_steps, options, 20), options)
        # 3 are found to be enough
        assert waves_until(4e-3, core, MIXTURE, grid, expected) <= 5
        report = sample(MIXTURE, x, scheduler(), num_steps, method=options).report
        assert all(report.converged)
        assert report.waves <= 6
        assert report.peak_rows <= num_nodes


@pytest.mark.parametrize("num_steps", [100, 200])
def test_the_limit_of_collocation_is_the_sampler_of_all_steps(num_steps: int) -> None:
    """Nodes that interpolate would stay where they are; here they take other places, and then all of them."""
    options, x, grid = Collocation(num_nodes=12), noise(4, DIMENSIONS), table(num_steps)
    expected = states(MIXTURE, x, grid)[-1]
    core = fixed_point(x, grid, sweeps_of(num_steps, options, 50), options)
    assert waves_until(1e-8, core, MIXTURE, grid, expected) <= 35


@pytest.mark.parametrize(
    "options", [Collocation(), ParaTAA(), FORMS["paradigms-whole"]], ids=["collocation", "parataa", "paradigms-whole"]
)
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

    extras = Extras(trajectory=trajectory, scaled=True)
    feed(fixed_point(x, grid, sweeps_of(20, options), options, extras), denoiser, grid, keep)


@pytest.mark.parametrize(
    "options",
    [
        ParaTAA(),
        ParaTAA(window=10, step_tolerance=1e-6),
        ParaTAA.published(window=100, step_tolerance=1e-6),
        ParaTAA.published(window=20, order=8, step_tolerance=1e-6),
    ],
    ids=["default", "window", "published", "published-order"],
)
def test_parataa_run_on_is_sequential(options: ParaTAA) -> None:
    x = noise(2, DIMENSIONS, dtype=torch.float32)
    expected = sample(MIXTURE, x, scheduler(), 50, method="sequential").sample
    found = sample(MIXTURE, x, scheduler(), 50, method=options, tolerance=1e-6)
    assert all(found.report.converged)
    assert found.report.waves < 40
    assert_close(found.sample, expected, 1e-4)


def residuals(trajectory: Trajectory, x: Tensor, grid: NoiseTable, extras: Extras = NOTHING) -> Tensor:
    """Root mean square of what each step of a trajectory misses, [N, samples]."""
    found = []
    departs = x
    for index, arrives in enumerate(trajectory.x[1:]):
        assert arrives is not None
        z = None if extras.draws is None else extras.draws[index]
        stepped, _ = grid.step(index, departs, mixture(departs, grid.timesteps[index].expand(len(x))), z=z)
        found.append((arrives - stepped).square().mean(1).sqrt())
        departs = arrives
    return torch.stack(found)


@pytest.mark.parametrize(
    ("window", "form", "name", "step_tolerance"),
    thinned_product([4, 15, 100], ["default", "published", "order"], ["ddim", "ddpm"], [1e-2, 1e-4]),
)
def test_a_window_leaves_no_step_with_a_larger_residual(
    form: str, name: str, window: int, step_tolerance: float
) -> None:
    how: dict[str, Any] = {"window": window, "step_tolerance": step_tolerance}
    options = {
        "default": ParaTAA(**how),
        "published": ParaTAA.published(**how),
        "order": ParaTAA.published(order=5, **how),
    }[form]
    stock, denoiser, eta = SAMPLERS[name]
    grid, x = table(60, stock, eta), noise(2, DIMENSIONS, seed=2)
    extras = extras_of(name, x, grid)
    core = fixed_point(x, grid, sweeps_of(60, options), options, extras)
    found, waves, checkpoints = feed(core, denoiser, grid)
    assert len(waves) < 60
    starts = [wave.positions[0] for wave in waves]
    assert starts == sorted(set(starts))
    for wave in waves:
        first = wave.positions[0]
        assert wave.positions == tuple(range(first, min(first + window, 60)))
    assert [checkpoint.settled for checkpoint in checkpoints] == [True]
    assert extras.trajectory is not None
    assert torch.equal(found, extras.trajectory.x[-1])
    assert float(residuals(extras.trajectory, x, grid, extras).max()) <= step_tolerance * (1 + 1e-9)


def test_a_window_that_has_slid_to_the_end_has_converged() -> None:
    for options in (ParaTAA(window=8, step_tolerance=1e-3), ParaDiGMS()):
        report = sample(MIXTURE, noise(3, DIMENSIONS), scheduler(), 40, method=options).report
        assert report.converged == [True] * 3
        assert report.waves < 40


def broken_far_out(x: Tensor, t: Tensor) -> Tensor:
    """NaN where a state is too large, as a network in half precision gives."""
    return torch.where(x.abs().amax(1, keepdim=True) > 50, math.nan, mixture(x, t))


@forms
def test_what_is_not_finite_goes_forwards_only(options: FixedPoint) -> None:
    """Points far out make the network fail there; those before them still become exact, one by one."""
    grid, x = table(10), noise(2, DIMENSIONS)
    guess = 1e3 * noise(11, 2, DIMENSIONS, seed=1)
    core = fixed_point(x, grid, sweeps_of(10, options), options, Extras(guess=guess))
    found, waves, _ = feed(core, broken_far_out, grid)
    assert len(waves) == 10
    assert_close(found, states(MIXTURE, x, grid)[-1], 1e-12)


def halves(image: Tensor, grid: NoiseTable, noise: Tensor) -> Callable[[Tensor, int, tuple[int, ...]], Tensor]:
    """The first half of every state is that of an image, at the noise level of its position."""
    mask = torch.arange(image.shape[1]) < image.shape[1] // 2

    def constrain(x: Tensor, position: int, samples: tuple[int, ...]) -> Tensor:
        at_end = position == grid.num_steps
        alpha, sigma = (1.0, 0.0) if at_end else (float(grid.alpha[position]), float(grid.sigma[position]))
        return torch.where(mask, (alpha * image + sigma * noise)[list(samples)], x)

    return constrain


@forms
def test_states_stay_as_they_must_be(options: FixedPoint) -> None:
    grid, x = table(30), noise(2, DIMENSIONS)
    extras = Extras(constrain=halves(noise(2, DIMENSIONS, seed=1), grid, x))
    expected = states(MIXTURE, x, grid, extras)[-1]
    whole = fixed_point(x, grid, sweeps_of(30, options), options, extras, watch_bits=True)
    assert_close(feed(whole, MIXTURE, grid)[0], expected, 1e-10)

    core = fixed_point(x, grid, sweeps_of(30, options), options, extras)
    if options.window is None:
        free = fixed_point(x, grid, sweeps_of(30, options), options)
        assert waves_until(4e-3, core, MIXTURE, grid, expected) <= 2 + waves_until(
            4e-3, free, MIXTURE, grid, states(MIXTURE, x, grid)[-1]
        )
    else:
        found, waves, _ = feed(core, MIXTURE, grid)
        assert len(waves) < 20
        assert float((found - expected).abs().mean()) < 0.05


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_noise_may_lie_in_memory_in_any_way(layout: str) -> None:
    x = noise(2, 3, 4, 5)
    other = x.transpose(1, 3).contiguous().transpose(1, 3) if layout == "transposed" else x[:1].expand(2, 3, 4, 5)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return x.sin() * (t.to(x) / 1000)[:, None, None, None]

    for options in FORMS.values():
        expected = sample(denoiser, other.clone(memory_format=torch.contiguous_format), scheduler(), 9, method=options)
        found = sample(denoiser, other, scheduler(), 9, method=options)
        assert_close(found.sample, expected.sample, 1e-12)


# between few nodes, or without a response, what is interpolated knows little of a guess
RELATED = {**FORMS, "collocation": Collocation()}
RELATED.pop("collocation-picard")


@pytest.mark.parametrize("options", RELATED.values(), ids=RELATED)
def test_a_related_sample_is_a_good_guess(options: FixedPoint) -> None:
    grid, x = table(50), noise(2, DIMENSIONS)
    expected = states(MIXTURE, x, grid)[-1]
    related = states(MIXTURE, x + 1e-3 * noise(2, DIMENSIONS, seed=1), grid)

    def core(guess: Tensor | None) -> Core:
        return fixed_point(x, grid, sweeps_of(50, options), options, Extras(guess=guess))

    if options.window is None:
        warm, cold = (waves_until(1e-3, core(guess), MIXTURE, grid, expected) for guess in (related, None))
    else:
        warm, cold = (len(feed(core(guess), MIXTURE, grid)[1]) for guess in (related, None))
    assert warm < cold


@forms
def test_the_limit_does_not_depend_on_the_guess(options: FixedPoint) -> None:
    grid, x = table(14), noise(2, DIMENSIONS)
    guess = noise(15, 2, DIMENSIONS, seed=1, dtype=torch.float32)
    core = fixed_point(x, grid, sweeps_of(14, options), options, Extras(guess=guess), watch_bits=True)
    assert_close(feed(core, MIXTURE, grid)[0], states(MIXTURE, x, grid)[-1], 1e-10)


@pytest.mark.parametrize("form", [name for name, options in FORMS.items() if options.num_nodes is None])
def test_a_guess_that_is_the_answer_stands_still(form: str) -> None:
    """To the bit, where the network does not tell rows apart: nothing moves, and windows slide by all they hold."""
    options, grid, x = FORMS[form], table(14), noise(2, DIMENSIONS)
    trajectory = Trajectory(14)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return 0.25 * x

    core = fixed_point(x, grid, sweeps_of(14, options), options, Extras(trajectory=trajectory), watch_bits=True)
    expected, _, _ = feed(core, network, grid)
    guess = torch.stack([x, *(state for state in trajectory.x if state is not None)])
    stood = []

    def keep(checkpoint: Checkpoint) -> tuple[int, ...]:
        stood.append(checkpoint.still is None or bool(checkpoint.still.all()))
        return ()

    core = fixed_point(x, grid, sweeps_of(14, options), options, Extras(guess=guess), watch_bits=True)
    found, waves, _ = feed(core, network, grid, keep)
    assert torch.equal(found, expected)
    assert stood == [True]
    assert len(waves) == math.ceil(14 / (options.window or 14))


@pytest.mark.parametrize(
    ("cls", "given", "says"),
    [
        (Collocation, {"num_nodes": 4}, "num_nodes is 4. It must be a whole number, 5 or more"),
        (Collocation, {"num_nodes": 20.0}, "num_nodes is 20.0"),
        (Collocation, {"num_nodes": True}, "num_nodes is True"),
        (Collocation, {"order": 3}, "num_nodes goes with neither window nor order"),
        (Collocation, {"window": 5, "step_tolerance": 0.1}, "num_nodes goes with neither window nor order"),
        (ParaTAA, {"history": 6}, "history is 6. It must be a whole number, 0 to 5"),
        (ParaTAA, {"history": -1}, "history is -1"),
        (ParaTAA, {"history": None}, "history is None"),
        (ParaTAA, {"order": 0}, "order is 0. It must be a whole number, 1 or more"),
        (ParaTAA, {"window": 0, "step_tolerance": 0.1}, "window is 0"),
        (ParaTAA, {"window": 5}, "window and step_tolerance belong together"),
        (ParaTAA, {"step_tolerance": 1e-3}, "window and step_tolerance belong together"),
        (ParaTAA, {"data_std": 0}, "data_std is 0. It must be a positive number"),
        (ParaTAA, {"data_std": -1.0}, "data_std is -1.0"),
        (ParaTAA, {"data_std": math.nan}, "data_std is nan"),
        (ParaTAA, {"data_std": "inf"}, "data_std is 'inf'"),
        (ParaTAA, {"regularisation": 0.0}, "regularisation is 0.0"),
        (ParaTAA, {"regularisation": math.inf}, "regularisation is inf"),
        (ParaDiGMS, {"step_tolerance": 0.0}, "step_tolerance is 0.0"),
        (ParaDiGMS, {"step_tolerance": None}, "window and step_tolerance belong together"),
        (ParaDiGMS, {"window": None}, "window and step_tolerance belong together"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else getattr(value, "__name__", "says"),
)
def test_bad_options_are_named(cls: type[FixedPoint], given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says) as caught:
        cls(**given)
    assert str(caught.value).startswith(cls.__name__)
    assert "See srds_fast.methods" in str(caught.value)
