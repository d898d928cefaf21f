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
    """Two samples at the first guidance, and all ten at every one where time does not matter."""
    every = (pytest.param(each, 10, marks=pytest.mark.exhaustive) for each in guidance)
    return pytest.mark.parametrize(("guidance", "samples"), [(guidance[0], 2), *every])


@functools.cache
def pipe() -> Any:
    pipe = zoo.load("digits")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(guidance: float, samples: int) -> dict[str, Any]:
    return {
        "prompt": zoo.prompts("digits")[:samples],
        "num_inference_steps": STEPS,
        "guidance_scale": guidance,
        "generator": [torch.Generator().manual_seed(seed) for seed in range(samples)],
    }


@functools.cache
def stock_latents(guidance: float, samples: int) -> Tensor:
    latents: Tensor = pipe()(**arguments(guidance, samples), output_type="latent").images
    return latents


def errors_of(found: Tensor, guidance: float, samples: int) -> Tensor:
    """Mean absolute difference from the stock latents, [samples]."""
    return (found - stock_latents(guidance, samples)).abs().flatten(1).mean(1)


def decoded(latents: Tensor) -> Tensor:
    with torch.no_grad():
        return (pipe().vae.decode(latents / pipe().vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


@cases(3.0, 7.5)
def test_srds_closes_in_on_the_sequential_images(guidance: float, samples: int) -> None:
    images = decoded(stock_latents(guidance, samples))
    fast = srds_fast.compile(pipe(), num_blocks=20, coarse_solver="2m", max_iterations=2, tolerance=0.0, method="srds")
    errors, grey = [], []
    for refinement in fast.stream(**arguments(guidance, samples)):
        errors.append(errors_of(refinement.latents, guidance, samples))
        grey.append(float(255 * (decoded(refinement.latents) - images).abs().mean()))
    assert fast.plan_for(num_inference_steps=STEPS).program().num_waves == 28
    assert srds_fast.program.srds(STEPS, 20, 1).num_waves == 24
    assert grey[1] < 0.2
    assert grey[2] < 0.02
    for iteration in (1, 2):
        assert bool((errors[iteration] < errors[iteration - 1] / 3).all()), "of every sample"


@cases(3.0, 7.5)
def test_the_default_tolerance_is_kept_by_every_sample(guidance: float, samples: int) -> None:
    fast = srds_fast.compile(pipe(), method="srds")
    found = fast(**arguments(guidance, samples), output_type="latent").images
    assert float(errors_of(found, guidance, samples).max()) <= 4e-3
    assert all(fast.report.converged)
    assert fast.report.waves <= 28


@cases(1.0)
def test_parataa_needs_nine_waves_at_most_and_run_on_is_the_sequential_sampler(guidance: float, samples: int) -> None:
    fast = srds_fast.compile(pipe(), method="parataa", max_iterations=11, tolerance=1e-7)
    stream = fast.stream(**arguments(guidance, samples))
    errors = [errors_of(refinement.latents, guidance, samples) for refinement in stream]
    grey = [127.5 * float(error.quantile(0.95)) for error in errors]
    assert all(each < 0.5 for each in grey[8:])  # after wave 9 and every later one
    assert float(errors[-1].max()) < 1e-4


@cases(1.0, 5.0)
def test_collocation_keeps_the_tolerance_in_few_rows(guidance: float, samples: int) -> None:
    fast = srds_fast.compile(pipe(), method="collocation")
    found = fast(**arguments(guidance, samples), output_type="latent").images
    assert float(errors_of(found, guidance, samples).max()) <= 4e-3
    assert sorted(fast.report.iterations_per_sample)[samples // 2] <= 9
    assert fast.report.waves <= 16
