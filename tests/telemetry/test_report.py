"""What a report says of its call is what happened."""

from __future__ import annotations

import html
import json
import math
import re
import time
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny
import torch
from calls import latents, look
from problems import noise, scheduler
from promises import SAME_SAMPLE, noisy
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


@pytest.mark.parametrize("name", SAME_SAMPLE)
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


def test_a_sample_of_the_same_law_is_never_called_the_sequential_one() -> None:
    report = srds_fast.sample(MIXTURE, noise(2, DIMENSIONS), noisy(), STEPS, method="speculative").report
    assert report.stopped_by == ["same law"] * 2
    assert (report.converged, report.estimated_error, report.missed) == ([False] * 2, [None] * 2, 2)
    headline, *lines = str(report).splitlines()
    assert headline.endswith("; another sample than that loop's, of the same law")
    assert any("same law as the sequential sampler's, another sample" in line for line in lines)
    assert not re.search("exact|tolerance", str(report))


def test_no_iteration_at_all_is_no_convergence() -> None:
    _, report = run(method="srds", max_iterations=0)
    assert (report.stopped_by, report.converged) == (["fixed iterations"] * 6, [False] * 6)


def test_a_window_that_slides_by_a_bound_of_its_own_says_so() -> None:
    _, report = run(method=ParaDiGMS(window=20, step_tolerance=1e-1), tolerance=4e-3)
    assert report.stopped_by == ["method's own rule"] * 6
    assert not any(report.converged)
    assert report.missed == 6
    assert "own rule, beyond tolerance (estimated)" in str(report)


def test_samples_of_a_batch_stop_for_their_own_reasons() -> None:
    """One sample is the sequential one from the start: its network does not look at the state."""

    def denoiser(x: Tensor, t: Tensor, still: Tensor) -> Tensor:
        return torch.where(still[:, None] > 0, torch.zeros_like(x), MIXTURE(x, t))

    still = torch.tensor([1.0, 0.0])
    report = srds_fast.sample(
        denoiser, noise(2, DIMENSIONS), scheduler(), STEPS, cond={"still": still}, method="srds"
    ).report
    assert report.stopped_by == ["exact", "tolerance"] or report.stopped_by == ["tolerance", "tolerance"]
    if report.stopped_by[0] == "exact":
        assert "exact: 1 sample; within tolerance (estimated): 1 sample" in str(report)


def test_a_run_that_starts_again_step_by_step_is_sequential() -> None:
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        """It cannot take waves of several rows."""
        return MIXTURE(x, t) * (math.nan if len(x) > 2 else 1.0)

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
    assert str(report).splitlines()[0].endswith("; a plain loop of the denoiser and the scheduler was not timed")
    clock, x = Clock(2e-3), noise(1, DIMENSIONS)
    monkeypatch.setattr(time, "perf_counter", clock)
    reports = [srds_fast.sample(clock.denoiser, x, scheduler(), STEPS, method="auto").report for _ in range(4)]
    for report in reports:
        assert report.method not in ("stock", "sequential"), "calls cost the same, however many rows they have"
        assert report.baseline in (STOCK_LOOP, SEQUENTIAL_LOOP)
        assert report.baseline_seconds == pytest.approx(STEPS * 2e-3, rel=1e-2)
        assert report.seconds == pytest.approx(report.waves * 2e-3, rel=1e-2)
        assert report.speedup == report.baseline_seconds / report.seconds == report.to_dict()["speedup"] > 1
        own = "a plain loop of the denoiser" if report.baseline == STOCK_LOOP else "one step after another"
        assert own in str(report).splitlines()[0]
        assert "measured)" in str(report).splitlines()[0]
    predicted = srds_fast.sample(clock.denoiser, x, scheduler(), STEPS, method="auto", explore=0.0).report
    assert predicted.predicted_seconds is not None
    assert predicted.speedup is predicted.baseline_seconds is None, "a prediction is no measurement"
    assert predicted.estimated_baseline_seconds == pytest.approx(STEPS * 2e-3, rel=1e-2)
    assert "x faster than one step after another (80 ms, estimated)" in str(predicted).splitlines()[0]


def made(**fields: Any) -> srds_fast.Report:
    """A report of a call of one sample."""
    given = {"method": "collocation", "engine": "eager", "path": "takeover", "num_inference_steps": 50, "waves": 8}
    ended = {"stopped_by": ["tolerance"], "estimated_error": [1e-3], "iterations_per_sample": [3], "tolerance": 4e-3}
    return srds_fast.Report(**{**given, **ended, "rows": 174, "peak_rows": 25, "seconds": 0.41, **fields})


def first_line(**fields: Any) -> str:
    return str(made(**fields)).splitlines()[0]


@pytest.mark.parametrize(
    ("loop", "words"),
    [
        ({"baseline": STOCK_LOOP}, "this pipeline's own loop"),
        ({"baseline": STOCK_LOOP, "path": "sample"}, "a plain loop of the denoiser and the scheduler"),
        ({"baseline": SEQUENTIAL_LOOP}, "one step after another"),
    ],
)
@pytest.mark.parametrize(
    ("seconds", "how"),
    [
        (0.41, "0.41 s, 1.7x faster than"),
        (0.84, "0.84 s, 1.2x slower than"),
        (0.68, "0.68 s, 1.03x faster than"),
        (0.701, "0.70 s, as fast as"),
    ],
)
def test_the_first_line_compares_with_a_loop_that_was_timed(
    loop: dict[str, str], words: str, seconds: float, how: str
) -> None:
    assert first_line(seconds=seconds, baseline_seconds=0.70, **loop) == f"{how} {words} (0.70 s, measured)"
    estimated = first_line(seconds=seconds, estimated_baseline_seconds=0.70)
    assert estimated == f"{how} one step after another (0.70 s, estimated)"
    both = first_line(seconds=seconds, baseline_seconds=0.70, estimated_baseline_seconds=5.0, **loop)
    assert both.endswith("measured)")


def test_the_first_line_claims_nothing_that_is_not_known() -> None:
    assert first_line() == "0.41 s; this pipeline's own loop was not timed"
    assert first_line(method="stock", path="stock", stopped_by=[], estimated_error=[]) == (
        "0.41 s, on this pipeline's own loop"
    )
    assert first_line(interrupted=True, baseline=STOCK_LOOP, baseline_seconds=1.0) == (
        "0.41 s, until the call was interrupted"
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "within tolerance (estimated)"),
        ({"stopped_by": ["exact"], "estimated_error": [None]}, "exact"),
        ({"stopped_by": ["sequential"], "estimated_error": [None]}, "exact: the steps were taken one after another"),
        ({"stopped_by": ["method's own rule"], "estimated_error": [None]}, "own rule, not compared with the tolerance"),
        ({"stopped_by": ["method's own rule"]}, "own rule, within tolerance (estimated)"),
        ({"stopped_by": ["method's own rule"], "estimated_error": [1.0]}, "own rule, beyond tolerance (estimated)"),
        ({"stopped_by": ["fixed iterations"]}, "fixed iterations, as many as were allowed"),
        (
            {"stopped_by": ["fixed iterations"], "fixed_by": "calibrated at a tolerance of 0.004"},
            "fixed iterations, calibrated at a tolerance of 0.004",
        ),
    ],
)
def test_the_table_says_by_what_a_sample_ended(fields: dict[str, Any], words: str) -> None:
    assert re.search(rf"^stop +{re.escape(words)}$", str(made(**fields)), re.MULTILINE)


def test_what_fixes_iterations_is_told() -> None:
    _, report = run(method="srds", latency="constant")
    assert report.fixed_by == "as latency='constant' asks"
    _, report = run(method="srds", max_iterations=1, tolerance=1e-9)
    assert report.fixed_by is None


def test_one_is_singular_and_more_are_plural() -> None:
    ones = str(made(waves=1, rows=1, peak_rows=1, num_inference_steps=1, iterations_per_sample=[1], dropped_waves=1))
    assert re.search(r"\b1 (waves|rows|steps|iterations|samples|network calls|times)\b", ones) is None
    assert "1 wave for 1 step; 1 row" in ones
    assert "collocation, 1 iteration" in ones
    assert "8 waves for 50 steps; 174 rows, at most 25 in one wave" in str(made())


def test_a_notebook_shows_the_same_table_escaped_and_loads_nothing() -> None:
    report = made(fallback_reason="<script src='http://x'>alert(1)</script> & more", left_out=["<b>"])
    found = report._repr_html_()
    assert "<script" not in found
    assert "&lt;script src=&#x27;http://x&#x27;&gt;" in found
    ElementTree.fromstring(found)  # well-formed
    for line in str(report).splitlines()[1:]:
        assert html.escape(line.split("  ", 1)[1].strip()) in found
    assert not re.search(r"<(img|link|iframe|object|script)|url\(|@import| on\w+=", found)
