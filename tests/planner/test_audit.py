"""Audits: the rule they give keeps its promise on new samples; runs stop by it; constant latency."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import tiny
import torch
from calls import latents
from problems import GaussianMixture, noise, scheduler, sequential_by_scheduler

import srds_fast
from srds_fast.planner.audit import FEWEST, LARGEST, MISSES, Audit

MIXTURE = GaussianMixture.random()


def run(generator: random.Random, bias: float) -> list[tuple[float, float]]:
    """Estimated and real errors of a run: they shrink, and an estimate is off by some factor."""
    real, errors = 1.0, []
    for _ in range(10):
        errors.append((real * bias * math.exp(generator.gauss(0, 1)), real))
        real *= generator.uniform(0.1, 0.6)
    return errors


def ends_beyond(errors: list[tuple[float, float]], factor: float, tolerance: float) -> bool:
    return next((real > tolerance for estimated, real in errors if estimated <= factor * tolerance), False)


@pytest.mark.parametrize("bias", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("samples", [FEWEST, 40, 200])
def test_the_share_of_new_samples_beyond_the_tolerance_is_kept(bias: float, samples: int) -> None:
    """Over many audits: the promise is of the expected share."""
    generator, tolerance, beyond, total, factors = random.Random(samples), 0.01, 0, 0, []
    for _ in range(150):
        audit = Audit(tolerance)
        for _ in range(samples):
            audit.record(run(generator, bias))
        factors.append(audit.factor)
        found = [ends_beyond(run(generator, bias), audit.factor, tolerance) for _ in range(40)]
        beyond, total = beyond + sum(found), total + len(found)
    assert beyond / total <= MISSES + 3 * math.sqrt(MISSES / total)
    if samples == 200:
        assert beyond / total >= MISSES / 5, "a rule that never misses waits too long"
        assert 0.1 * bias < sorted(factors)[75] < 3 * bias, "estimates that are too high are compared with more"


def test_too_few_samples_change_nothing() -> None:
    audit = Audit(0.01)
    for number in range(FEWEST):
        assert audit.factor == 1.0
        assert f"{number} of {FEWEST}" in audit.rule
        audit.record([(1.0, 1.0), (0.05, 0.001)])
    assert audit.factor == LARGEST, "no sample of these ends beyond the tolerance"
    assert "5%" in audit.rule
    assert f"{FEWEST} audited" in audit.rule


CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 12, "guidance_scale": 1.0, "output_type": "latent"}


def test_a_pipeline_is_audited_in_warmup_and_its_calls_say_so() -> None:
    pipe = tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, method="srds", tolerance=1e-2)
    state = torch.get_rng_state()
    fast.warmup(**CALL, audit=FEWEST - 1)
    assert torch.equal(torch.get_rng_state(), state), "no random generator advances"
    fast(**CALL)
    assert f"{FEWEST - 1} of {FEWEST}" in fast.report.stop_rule
    fast.warmup(**CALL, audit=1)
    for seed in range(3):
        found, expected = (each(**CALL, generator=torch.Generator().manual_seed(seed)).images for each in (fast, pipe))
        assert f"{FEWEST} audited" in fast.report.stop_rule
        assert float(torch.as_tensor(found - expected).abs().mean()) < 1e-2
    fast(**{**CALL, "num_inference_steps": 16})
    assert fast.report.stop_rule is None, "of another number of steps nothing is known"
    fast.reset()
    fast(**CALL)
    assert fast.report.stop_rule is None


def test_a_share_of_the_calls_is_audited() -> None:
    pipe = tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, method="srds", audit=0.5)
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda *given: calls.append(1))
    beside = []
    for _ in range(4):
        calls.clear()
        fast(**CALL)
        beside.append(len(calls) - fast.report.waves - fast.report.check_calls)
    assert beside[0] == beside[2] == 0 < 12 < min(beside[1], beside[3])


@pytest.mark.parametrize("audit", [-0.1, 1.5, math.nan, True, "all"])
def test_a_share_that_is_none_is_refused(audit: Any) -> None:
    with pytest.raises(srds_fast.InvalidArgument, match="audit"):
        srds_fast.compile(tiny.stable_diffusion(), audit=audit)


def test_samples_that_are_all_the_same_are_refused() -> None:
    fast = srds_fast.compile(tiny.stable_diffusion())
    with pytest.raises(srds_fast.InvalidArgument, match="latents"):
        fast.warmup("a cat", audit=3, latents=torch.zeros(1, 4, 8, 8))


def stops(report: srds_fast.Report) -> list[tuple[str, float | None]]:
    return list(zip(report.stopped_by, report.estimated_error, strict=True))


@pytest.mark.parametrize("method", ["srds", "collocation", "parataa", "chords"])
def test_calls_of_constant_latency_take_the_same_waves_and_count_what_they_miss(method: str) -> None:
    counts = set()
    for seed in range(6):
        x = noise(2, 64, seed=seed)
        report = srds_fast.sample(MIXTURE, x, scheduler(), 40, method=method, latency="constant", tolerance=1e-3).report
        counts.add((report.waves, report.rows, report.evaluations))
        beyond = [by != "exact" and not (error or math.inf) <= 1e-3 for by, error in stops(report)]
        assert report.missed == sum(beyond) == report.to_dict()["missed"]
        assert report.converged == [by == "exact" for by in report.stopped_by], "so many were taken in any case"
        assert len(report.change) > 0
    assert len(counts) == 1
    short: dict[str, Any] = {"method": method, "latency": "constant", "tolerance": 1e-9, "max_iterations": 2}
    assert srds_fast.sample(MIXTURE, x, scheduler(), 40, **short).report.missed == 2
    close = srds_fast.sample(MIXTURE, x, scheduler(), 40, method=method, latency="constant", max_iterations=10)
    assert close.report.missed == 0
    assert float((close.sample - sequential_by_scheduler(MIXTURE, x, 40)).abs().mean()) < 0.02


def test_auto_of_constant_latency_explores_plans_of_fixed_iterations() -> None:
    x = noise(1, 64)
    for _ in range(5):
        report = srds_fast.sample(MIXTURE, x, scheduler(), 40, method="auto", latency="constant").report
        assert report.plan_state in ("exploring", "frozen")
    refused: list[dict[str, Any]] = [{"latency": "constant", "exact": True}, {"latency": "low"}]
    for settings in refused:
        with pytest.raises(srds_fast.InvalidArgument, match="latency"):
            srds_fast.sample(MIXTURE, x, scheduler(), 40, **settings)


def test_pipelines_of_constant_latency_are_right() -> None:
    pipe = tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, method="srds", latency="constant", max_iterations=3)
    found = latents(fast, prompt="a cat", num_inference_steps=9)
    assert fast.report.iterations == 3
    assert float((found - latents(pipe, prompt="a cat", num_inference_steps=9)).abs().mean()) < 0.05
