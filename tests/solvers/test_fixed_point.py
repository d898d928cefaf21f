"""Fixed-point methods: the sequential sampler at their limit, point by point, and how fast they get there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cores import assert_close, feed, table
from fixed_points import FORMS, forms, inputs_of, states, sweeps_of
from hypothesis import given
from hypothesis import strategies as st
from problems import noise, scheduler
from samplers import DIMENSIONS, MIXTURE, SAMPLERS, mixture, run
from torch import Tensor

from srds_fast import Report, sample
from srds_fast.kernels.fixed_point_wave import Scan, ScanStep, scan
from srds_fast.solvers.contract import Checkpoint, SolverInputs
from srds_fast.solvers.fixed_point.options import FixedPoint, ParaDiGMS, ParaTAA
from srds_fast.solvers.fixed_point.solver import fixed_point


@st.composite
def any_options(draw: st.DrawFn) -> FixedPoint:
    shared = {
        "data_std": draw(st.sampled_from([None, 0.3, 1.0, 2, math.inf])),
        "history": draw(st.integers(0, 5)),
        "regularisation": draw(st.sampled_from([1e-8, 1e-3, 1.0])),
    }
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
@pytest.mark.parametrize("form", ["parataa", "parataa-order", "paradigms-whole"])
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


@forms
@pytest.mark.parametrize("name", ["ddim", "ddpm", "ddim-eta", "dpm"])
def test_every_wave_begins_at_an_exact_point(name: str, options: FixedPoint) -> None:
    """With all points as rows, after wave k the first k steps are exact."""
    stock, denoiser, eta = SAMPLERS[name]
    grid, x = table(12, stock, eta), noise(2, DIMENSIONS)
    inputs = inputs_of(x, grid)
    expected = states(denoiser, x, grid, inputs)
    assert inputs.trajectory is not None
    trajectory = inputs.trajectory.x
    seen = []

    def keep(checkpoint: Checkpoint) -> None:
        done = checkpoint.iteration if options.window is None else 12
        assert_close(torch.stack([x for x in trajectory[1 : done + 1] if x is not None]), expected[1 : done + 1], 1e-12)
        seen.append((checkpoint.iteration, checkpoint.exact))

    core = fixed_point(x, grid, sweeps_of(12, options), options, inputs, bitwise=options.window is not None)
    found, waves, _ = feed(core, denoiser, grid, keep)
    if options.window is None:
        assert seen == [(iteration, iteration == 12) for iteration in range(1, 13)]
    assert_close(found, expected[-1], 1e-12)
    for wave in waves:
        assert_close(wave.x[0], expected[wave.positions[0]], 1e-12)


def broken_far_out(x: Tensor, t: Tensor) -> Tensor:
    """NaN where a state is too large, as a network in half precision gives."""
    return torch.where(x.abs().amax(1, keepdim=True) > 50, math.nan, mixture(x, t))


@forms
def test_what_is_not_finite_goes_forwards_only(options: FixedPoint) -> None:
    """Points far out make the network fail there; those before them still become exact, one by one."""
    grid, x = table(10), noise(2, DIMENSIONS)
    guess = 1e3 * noise(11, 2, DIMENSIONS, seed=1, dtype=torch.float32)
    core = fixed_point(x, grid, sweeps_of(10, options), options, SolverInputs(initial_guess=guess))
    found, waves, _ = feed(core, broken_far_out, grid)
    assert len(waves) == 10
    assert_close(found, states(MIXTURE, x, grid)[-1], 1e-12)


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


@given(st.integers(0, 69), st.integers(1, 70), st.sampled_from([(8, 4), (16, 8), (64, 32)]))
def test_blocks_of_a_long_grid_are_its_whole_matrix(first: int, size: int, blocks: tuple[int, int]) -> None:
    """Any window of it, whether it lies within a block or goes over several."""
    generator = torch.Generator().manual_seed(first)
    steps = [ScanStep(1.0, 0.3, c) for c in (0.9 + 0.2 * torch.rand(70, generator=generator)).tolist()]
    size = min(size, len(steps) - first)
    shape = size + 1, 2, 3
    y, m = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))

    def points() -> Tensor:
        return Scan(steps, torch.float64, torch.device("cpu"), 2).points(y, m[:-1], first)

    whole = points()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "BLOCK", blocks[0])
        patch.setattr(scan, "HALF", blocks[1])
        assert_close(points(), whole, 1e-12)
