"""Convergence where it counts: on the bundled, trained pipeline."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import srds_fast
from srds_fast import zoo

STEPS = 100


def cases(*guidance: float) -> Any:
    """Two digits at the first guidance; where time does not matter the others, shared out among every guidance."""
    share = 8 // len(guidance)
    others = (
        pytest.param(each, range(2 + number * share, 2 + (number + 1) * share), marks=pytest.mark.exhaustive)
        for number, each in enumerate(guidance)
    )
    return pytest.mark.parametrize(("guidance", "digits"), [(guidance[0], range(2)), *others], ids=str)


@functools.cache
def pipe() -> Any:
    pipe = zoo.load("digits")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(guidance: float, digits: range) -> dict[str, Any]:
    return {
        "prompt": [zoo.prompts("digits")[digit] for digit in digits],
        "num_inference_steps": STEPS,
        "guidance_scale": guidance,
        "generator": [torch.Generator().manual_seed(seed) for seed in digits],
    }


@functools.cache
def stock_latents(guidance: float, digits: range) -> Tensor:
    latents: Tensor = pipe()(**arguments(guidance, digits), output_type="latent").images
    return latents


def errors_of(found: Tensor, guidance: float, digits: range) -> Tensor:
    """Mean absolute difference from the stock latents, [samples]."""
    return (found - stock_latents(guidance, digits)).abs().flatten(1).mean(1)


def decoded(latents: Tensor) -> Tensor:
    with torch.no_grad():
        return (pipe().vae.decode(latents / pipe().vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


@cases(3.0, 7.5)
def test_srds_closes_in_on_the_sequential_images(guidance: float, digits: range) -> None:
    images = decoded(stock_latents(guidance, digits))
    fast = srds_fast.compile(pipe(), num_blocks=20, coarse_solver="2m", max_iterations=2, tolerance=0.0, method="srds")
    errors, grey = [], []
    for refinement in fast.stream(**arguments(guidance, digits)):
        errors.append(errors_of(refinement.latents, guidance, digits))
        grey.append(float(255 * (decoded(refinement.latents) - images).abs().mean()))
    assert fast.plan_for(num_inference_steps=STEPS).program().num_waves == 28
    assert srds_fast.program.srds(STEPS, 20, 1).num_waves == 24
    assert grey[1] < 0.2
    assert grey[2] < 0.02
    for iteration in (1, 2):
        assert bool((errors[iteration] < errors[iteration - 1] / 3).all()), "of every sample"


@cases(3.0, 7.5)
def test_the_default_tolerance_is_kept_by_every_sample(guidance: float, digits: range) -> None:
    fast = srds_fast.compile(pipe(), method="srds")
    found = fast(**arguments(guidance, digits), output_type="latent").images
    assert float(errors_of(found, guidance, digits).max()) <= 4e-3
    assert all(fast.report.converged)
    assert fast.report.waves <= 28


@cases(1.0)
def test_parataa_needs_nine_waves_at_most_and_run_on_is_the_sequential_sampler(guidance: float, digits: range) -> None:
    fast = srds_fast.compile(pipe(), method="parataa", max_iterations=11, tolerance=1e-7)
    stream = fast.stream(**arguments(guidance, digits))
    errors = [errors_of(refinement.latents, guidance, digits) for refinement in stream]
    grey = [127.5 * float(error.quantile(0.95)) for error in errors]
    assert all(each < 0.5 for each in grey[8:])  # after wave 9 and every later one
    assert float(errors[-1].max()) < 1e-4


@cases(1.0, 5.0)
def test_collocation_keeps_the_tolerance_in_few_rows(guidance: float, digits: range) -> None:
    fast = srds_fast.compile(pipe(), method="collocation")
    found = fast(**arguments(guidance, digits), output_type="latent").images
    assert float(errors_of(found, guidance, digits).max()) <= 4e-3
    assert sorted(fast.report.iterations_per_sample)[len(digits) // 2] <= 9
    assert fast.report.waves <= 16
