"""What a report says of its call is what happened."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
import tiny
import torch
from calls import latents, look
from problems import noise, scheduler
from samplers import DIMENSIONS, MIXTURE
from torch import Tensor

import srds_fast
from srds_fast.methods import ParaDiGMS
from srds_fast.solvers.registry import BY_NAME
from srds_fast.telemetry.report import SEQUENTIAL_LOOP, STOCK_LOOP

STEPS = 40
ENDS = {"exact", "sequential", "tolerance", "method's own rule", "fixed iterations"}


def run(**settings: Any) -> tuple[Tensor, srds_fast.Report]:
    found = srds_fast.sample(MIXTURE, noise(6, DIMENSIONS), scheduler(), STEPS, **settings)
    report = found.report
    assert len(report.stopped_by) == len(report.estimated_error) == len(report.converged) == 6
    assert set(report.stopped_by) <= ENDS
    assert report.to_dict() == json.loads(json.dumps(report.to_dict()))
    assert report.to_dict()["converged"] == report.converged
    return found.sample, report


@pytest.mark.parametrize("name", BY_NAME)
def test_a_sample_is_called_converged_for_what_ended_its_run(name: str) -> None:
    _, exact = run(method=name, exact=True)
    assert exact.stopped_by == ["sequential" if name == "sequential" else "exact"] * 6
    assert exact.converged == [True] * 6
    assert exact.estimated_error == [None] * 6, "of an exact sample nothing is estimated"
    _, report = run(method=name, tolerance=4e-3)
    for by, error, converged in zip(report.stopped_by, report.estimated_error, report.converged, strict=True):
        if by in ("exact", "sequential"):
            assert (error, converged) == (None, True)
        elif by == "tolerance":
            assert error <= 4e-3 * (1 + 1e-6)
            assert converged
        else:
            assert by == ("method's own rule" if BY_NAME[name]().slides else "fixed iterations")
            assert converged == (by == "method's own rule" and error is not None and error <= 4e-3)


@pytest.mark.parametrize("settings", [{"max_iterations": 1, "tolerance": 1e-9}, {"latency": "constant"}])
@pytest.mark.parametrize("name", ["srds", "collocation", "parataa"])
def test_fixed_iterations_are_not_called_converged(name: str, settings: dict[str, Any]) -> None:
    _, report = run(method=name, **settings)
    assert set(report.stopped_by) <= {"fixed iterations", "exact"}
    assert report.converged == [by == "exact" for by in report.stopped_by]
    _, bitwise = run(method=name, tolerance=0.0, max_iterations=2)
    assert bitwise.stopped_by == ["fixed iterations"] * 6
    assert bitwise.estimated_error == [None] * 6
    assert not any(bitwise.converged)


def test_no_iteration_at_all_is_no_convergence() -> None:
    _, report = run(method="srds", max_iterations=0)
    assert (report.stopped_by, report.converged) == (["fixed iterations"] * 6, [False] * 6)


def test_a_window_that_slides_by_a_bound_of_its_own_says_so() -> None:
    _, report = run(method=ParaDiGMS(window=20, step_tolerance=1e-1), tolerance=4e-3)
    assert report.stopped_by == ["method's own rule"] * 6
    assert not any(report.converged)
    assert report.missed == 6
    assert "method's own rule" in str(report)


def test_samples_of_a_batch_stop_for_their_own_reasons() -> None:
    """One sample is the sequential one from the start: its network does not look at the state."""

    def denoiser(x: Tensor, t: Tensor, still: Tensor) -> Tensor:
        return torch.where(still[:, None] > 0, torch.zeros_like(x), MIXTURE(x, t))

    still = torch.tensor([1.0, 0.0])
    report = srds_fast.sample(
        denoiser, noise(2, DIMENSIONS), scheduler(), STEPS, cond={"still": still}, method="srds"
    ).report
    assert report.stopped_by == ["exact", "tolerance"] or report.stopped_by == ["tolerance", "tolerance"]
    assert str(report).count("stopped by") == 1


def test_a_run_that_starts_again_step_by_step_is_sequential() -> None:
    calls = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return MIXTURE(x, t) * (math.nan if len(calls) == 3 else 1.0)

    report = srds_fast.sample(denoiser, noise(2, DIMENSIONS), scheduler(), 12, method="srds").report
    assert report.fallback_reason is not None
    assert (report.stopped_by, report.converged) == (["sequential"] * 2, [True] * 2)


def test_a_failed_run_has_no_sample_to_tell_of() -> None:
    with pytest.raises(srds_fast.DivergenceError) as caught:
        srds_fast.sample(lambda x, t: x * math.nan, noise(2, DIMENSIONS), scheduler(), 12, method="srds", strict=True)
    assert caught.value.report.stopped_by == caught.value.report.converged == []


def test_interrupted_and_changed_runs_are_not_called_converged() -> None:
    fast = srds_fast.compile(tiny.stable_diffusion(), method="srds")

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 3
        return tensors

    latents(fast, prompt="a cat", callback_on_step_end=interrupt)
    assert (fast.report.stopped_by, fast.report.converged) == (["interrupted"], [False])
    latents(fast, prompt="a cat", callback_on_step_end=look)
    assert fast.report.stopped_by in (["tolerance"], ["exact"])

    def change(at: int) -> Any:
        def changed(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return {"latents": tensors["latents"] * 0.9} if step == at else tensors

        return changed

    latents(fast, prompt="a cat", callback_on_step_end=change(0))
    assert fast.report.fallback_reason is not None
    assert fast.report.stopped_by == ["sequential"], "step 0 was exact, and all others followed it"
    late = srds_fast.compile(fast, method="srds", tolerance=1e9)
    latents(late, prompt="a cat", callback_on_step_end=change(7))
    assert late.report.stopped_by == ["tolerance"], "the state that it went on from was as good as the run was"
    assert (late.report.estimated_error, late.report.converged) == ([None], [False])


class Clock:
    """Time that passes in network calls alone, and a little whenever it is read: no machine is too busy to time them.

    per_call: seconds that one takes, however many rows it has.
    """

    def __init__(self, per_call: float) -> None:
        self.now, self._per_call = 0.0, per_call

    def __call__(self) -> float:
        self.now += 1e-7
        return self.now

    def denoiser(self, x: Tensor, t: Tensor) -> Tensor:
        self.now += self._per_call
        return MIXTURE(x, t)


def test_a_speedup_is_told_only_of_loops_that_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, report = run(method="srds")
    assert report.speedup is report.baseline is report.baseline_seconds is None
    first = str(report).splitlines()[0]
    assert first.startswith(f"srds: {report.waves} waves ({report.rows} rows) for {STEPS} steps, ")
    assert "measured" not in first
    clock, x = Clock(2e-3), noise(1, DIMENSIONS)
    monkeypatch.setattr(time, "perf_counter", clock)
    reports = [srds_fast.sample(clock.denoiser, x, scheduler(), STEPS, method="auto").report for _ in range(4)]
    for report in reports:
        assert report.method not in ("stock", "sequential"), "calls cost the same, however many rows they have"
        assert report.baseline in (STOCK_LOOP, SEQUENTIAL_LOOP)
        assert report.baseline_seconds == pytest.approx(STEPS * 2e-3, rel=1e-2)
        assert report.seconds == pytest.approx(report.waves * 2e-3, rel=1e-2)
        assert report.speedup == report.baseline_seconds / report.seconds == report.to_dict()["speedup"] > 1
        own = "denoiser and scheduler alone" if report.baseline == STOCK_LOOP else "the sequential loop"
        assert own in str(report).splitlines()[0]
        assert "measured)" in str(report).splitlines()[0]
    predicted = srds_fast.sample(Clock(2e-3).denoiser, x, scheduler(), STEPS, method="auto", explore=0.0).report
    assert predicted.predicted_seconds is not None
    assert predicted.speedup is None, "a prediction is no measurement"


@pytest.mark.parametrize(
    ("baseline", "words"), [(STOCK_LOOP, "this pipeline's own loop"), (SEQUENTIAL_LOOP, "the sequ")]
)
@pytest.mark.parametrize(("seconds", "factor"), [(0.41, "1.71x faster than"), (1.4, "2.00x slower than")])
def test_the_first_line_says_what_ran_and_against_what(baseline: str, words: str, seconds: float, factor: str) -> None:
    report = srds_fast.Report(
        "collocation", "eager", "takeover", 50, waves=8, rows=174, seconds=seconds, baseline=baseline,
        baseline_seconds=0.70,
    )  # fmt: skip
    first = str(report).splitlines()[0]
    assert first.startswith(f"collocation: 8 waves (174 rows) for 50 steps, {seconds:.2f} s, {factor} {words}")
    assert first.endswith("(0.70 s, measured)")
