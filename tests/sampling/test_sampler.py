"""`sample()`: any denoiser, any state shape, the contract of its arguments and its report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import (
    RePaintScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from problems import GaussianMixture, LinearOde, noise, scheduler, sequential_by_scheduler
from promises import stock_of
from torch import Tensor

import srds_fast
from srds_fast import DivergenceError, InvalidArgument, PlanMismatch, UnsupportedScheduler, sample
from srds_fast.solvers.convergence import estimated_error
from srds_fast.solvers.registry import METHODS
from srds_fast.solvers.srds import SRDS

MIXTURE = GaussianMixture.random()
LINEAR = LinearOde.random()


class Counting:
    """A denoiser that remembers what it was given."""

    def __init__(self, denoiser: Callable[..., Tensor]) -> None:
        self.denoiser = denoiser
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self.calls.append((x, t))
        return self.denoiser(x, t, **cond)


@given(st.integers(1, 20), st.data())
def test_exact_is_sequential_for_any_plan(num_steps: int, data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, num_steps))
    coarse_solver, pipelined = data.draw(st.sampled_from(["ddim", "2m"])), data.draw(st.booleans())
    x = noise(data.draw(st.integers(1, 3)), 64, seed=data.draw(st.integers(0, 99)))
    found = sample(
        MIXTURE,
        x,
        scheduler(),
        num_steps,
        exact=True,
        num_blocks=num_blocks,
        coarse_solver=coarse_solver,
        pipelined=pipelined,
        max_rows=data.draw(st.sampled_from([None, 1, 4])),
    )
    torch.testing.assert_close(found.sample, sequential_by_scheduler(MIXTURE, x, num_steps), rtol=1e-10, atol=1e-10)
    assert all(found.report.converged)


@pytest.mark.parametrize("method", ["srds", "collocation", "paradigms"])
def test_waves_that_do_not_fit_into_memory_are_taken_one_row_at_a_time(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    most = 2

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return MIXTURE(x, t)

    x = noise(1, 64)
    found = sample(denoiser, x, scheduler(), 30, method=method)
    torch.testing.assert_close(found.sample, sequential_by_scheduler(MIXTURE, x, 30), rtol=1e-10, atol=1e-10)
    assert found.report.method == "sequential"
    assert found.report.fallback_reason is not None
    assert "did not fit" in found.report.fallback_reason
    assert "max_rows" in caplog.text
    most = 0  # not even one row
    with pytest.raises(torch.OutOfMemoryError):
        sample(denoiser, x, scheduler(), 30, method=method)
    with pytest.raises(torch.OutOfMemoryError):
        sample(denoiser, x, scheduler(), 30, method="sequential")


@pytest.mark.parametrize("shape", [(1, 7), (3, 1, 31), (2, 5, 3)], ids=["vector", "audio", "points"])
def test_any_state_shape(shape: tuple[int, ...]) -> None:
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return x.sin() * (t.to(x) / 1000).reshape(-1, *[1] * (x.ndim - 1))

    x = noise(*shape)
    expected = sample(denoiser, x, scheduler(), 20, method="sequential")
    found = sample(denoiser, x, scheduler(), 20, exact=True)
    torch.testing.assert_close(found.sample, expected.sample, rtol=1e-10, atol=1e-10)


def test_conditioning_follows_its_sample_after_others_have_left() -> None:
    shift = noise(4, 64, seed=5) * torch.tensor([0.1, 3.0, 1.0, 0.0], dtype=torch.float64)[:, None]
    x = noise(4, 64)
    # one in flight: no iteration says that the one before is enough
    settings: dict[str, Any] = {"method": SRDS(in_flight=1), "cond": {"shift": shift}}
    probe = sample(MIXTURE, x, scheduler(), 60, **settings, tolerance=0.0, max_iterations=1).report
    assert (probe.stopped_by, [len(change) for change in probe.change]) == (["fixed iterations"] * 4, [4])
    # a tolerance that lets some samples go after the first iteration, not all
    tolerance = estimated_error([sorted(probe.change[0])[2]])
    together = sample(MIXTURE, x, scheduler(), 60, **settings, tolerance=tolerance)
    assert sorted(together.report.iterations_per_sample) == [1, 1, 1, 2]
    assert together.report.evaluations < 4 * together.report.rows
    for one in range(4):
        cond = {"shift": shift[one : one + 1]}
        alone = sample(MIXTURE, x[one : one + 1], scheduler(), 60, **{**settings, "cond": cond}, tolerance=tolerance)
        torch.testing.assert_close(alone.sample[0], together.sample[one], rtol=1e-10, atol=1e-10)
        assert alone.report.iterations == together.report.iterations_per_sample[one]


def test_the_tolerance_bounds_the_real_error() -> None:
    x = noise(16, 64)
    expected = sequential_by_scheduler(MIXTURE, x, 100)
    for tolerance in (1e-2, 1e-3, 1e-4):
        found = sample(MIXTURE, x, scheduler(), 100, tolerance=tolerance)
        error = (found.sample - expected).abs().mean(1)
        assert all(found.report.converged)
        assert found.report.waves < 100
        assert float((error <= tolerance).double().mean()) >= 15 / 16, error


def test_nothing_of_the_users_is_changed() -> None:
    stock = scheduler()
    stock.set_timesteps(7)
    before, rng = copy.deepcopy(stock.__dict__), torch.get_rng_state()
    x = noise(1, 64)
    kept = x.clone()
    sample(MIXTURE, x, stock, 20)
    assert stock.num_inference_steps == before["num_inference_steps"]
    assert torch.equal(stock.timesteps, before["timesteps"])
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_network_sees_its_dtype_and_the_result_has_it(dtype: torch.dtype) -> None:
    calls = Counting(LINEAR)
    x = noise(2, 6, dtype=dtype)
    found = sample(lambda x, t: calls(x, t).to(dtype), x, scheduler(), 20)
    assert {given.dtype for given, _ in calls.calls} == {dtype}
    assert {t.dtype for _, t in calls.calls} == {torch.int64}
    assert found.sample.dtype == dtype
    expected = sample(LINEAR, x.double(), scheduler(), 20, method="sequential").sample
    torch.testing.assert_close(
        found.sample.double(), expected, rtol=0, atol=0.1 if dtype in (torch.float16, torch.bfloat16) else 0.02
    )


def test_gradients_are_off() -> None:
    weight = torch.ones(64, dtype=torch.float64, requires_grad=True)
    assert not sample(lambda x, t: MIXTURE(x, t) * weight, noise(1, 64), scheduler(), 10).sample.requires_grad


def test_an_unstable_coarse_solver_is_an_error_unless_exact() -> None:
    """Stiff where jumps are long: eps grows fast in x, so one jump overshoots what the fine steps do not."""
    stiff = LinearOde(torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64) * 1e-8)

    def amplified(x: Tensor, t: Tensor) -> Tensor:
        return stiff(x, t) * 30

    x = noise(1, 6)
    with pytest.raises(DivergenceError):
        sample(amplified, x, scheduler(), 100, num_blocks=10, strict=True)
    found = sample(amplified, x, scheduler(), 100, num_blocks=10, exact=True)
    expected = sequential_by_scheduler(amplified, x, 100)
    torch.testing.assert_close(found.sample, expected, rtol=1e-6, atol=1e-6)


GOOD = {"x": noise(2, 64), "steps": 10}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": [1.0]}, "list"),
        ({"x": noise(2, 64).long()}, "int64"),
        ({"x": torch.zeros(3, dtype=torch.float64)}, r"\[batch, \.\.\.\]"),
        ({"steps": 0}, "num_inference_steps"),
        ({"cond": {"shift": noise(3, 64)}}, "batch, 2"),
        ({"method": "picard"}, "sequential, srds"),
        ({"coarse_solver": "heun"}, "ddim, 2m"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"num_blocks": 11}, "10"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"max_iterations": -1}, "max_iterations"),
        ({"max_rows": 0}, "max_rows"),
        ({"engine": "tpu"}, "eager"),
        ({"denoiser": lambda x, t: x[:1]}, "input's shape"),
        ({"denoiser": lambda x, t: (x,)}, "tuple"),
        ({"denoiser": None}, "denoiser is None"),
        ({"x": noise(2, 64).to_sparse()}, "layout"),
        ({"x": noise(2, 64).to("meta")}, "meta"),
        ({"steps": True}, "num_inference_steps"),
        ({"cond": [1]}, "cond is"),
        ({"cond": {3: noise(2, 64)}}, "a string"),
        ({"exact": "False"}, "exact is 'False'"),
        ({"pipelined": "no"}, "pipelined is 'no'"),
        ({"strict": 1}, "strict is 1"),
        ({"keep_trajectory": "no"}, "keep_trajectory"),
        ({"tolerance": True}, "tolerance is True"),
        ({"explore": "3"}, "explore is '3'"),
        ({"eta": True}, "eta is True"),
        ({"eta": -1.0}, "eta is -1.0"),
        ({"max_rows": 2.5}, "max_rows"),
        ({"observer": 3}, "observer is 3"),
        ({"generator": 3}, "generator is 3"),
        ({"generator": [torch.Generator()]}, "1 generator for 2"),
        ({"graphs": 3}, "graphs is 3"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_named(change: dict, says: str) -> None:
    given = {**GOOD, "denoiser": MIXTURE, **change}
    denoiser, x, steps = given.pop("denoiser"), given.pop("x"), given.pop("steps")
    with pytest.raises(InvalidArgument, match=says):
        sample(denoiser, x, scheduler(), steps, **given)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_an_output_that_is_no_real_number_is_refused(method: str, dtype: torch.dtype) -> None:
    with pytest.raises(InvalidArgument, match=f"returned {dtype}"):
        sample(lambda x, t: MIXTURE(x, t).to(dtype), noise(1, 64), stock_of(method), 10, method=method)


def test_an_unsupported_scheduler_is_refused() -> None:
    with pytest.raises(UnsupportedScheduler, match="RePaintScheduler"):
        sample(MIXTURE, noise(1, 64), RePaintScheduler(), 10)
    with pytest.raises(InvalidArgument, match="an instance of a diffusers scheduler"):
        sample(MIXTURE, noise(1, 64), RePaintScheduler, 10)


def test_a_plan_can_be_saved_and_fits_one_number_of_steps(tmp_path: Path) -> None:
    from srds_fast.planner.choose import choose
    from srds_fast.planner.settings import Settings

    plan = choose(40, Settings(num_blocks=8, coarse_solver="ddim", max_iterations=3, tolerance=0.0))
    plan.save(tmp_path / "plan.json")
    loaded = srds_fast.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    report = sample(MIXTURE, noise(1, 64), scheduler(), 40, plan=loaded).report
    assert (report.num_blocks, report.coarse_solver, report.iterations) == (8, "ddim", 3)
    assert f"waves {report.waves}, rows {report.rows}" in str(plan)
    with pytest.raises(InvalidArgument, match="together with tolerance"):
        sample(MIXTURE, noise(1, 64), scheduler(), 40, plan=loaded, tolerance=1e-3)
    with pytest.raises(PlanMismatch, match="40 steps"):
        sample(MIXTURE, noise(1, 64), scheduler(), 41, plan=loaded)
    (tmp_path / "plan.json").write_text('{"method": "srds"}')
    with pytest.raises(PlanMismatch, match="fields of SRDS"):
        srds_fast.Plan.load(tmp_path / "plan.json")


def test_reset_makes_a_call_measure_again() -> None:
    network = Counting(MIXTURE)
    for measures in (True, False, True):
        network.calls.clear()
        report = sample(network, noise(1, 64), scheduler(), 20, method="auto", explore=0).report
        assert (len(network.calls) > report.waves) == measures
        if not measures:
            srds_fast.compile(tiny.stable_diffusion()).reset()
