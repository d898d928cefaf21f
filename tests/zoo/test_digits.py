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


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = zoo.load("digits")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(guidance: float) -> dict[str, Any]:
    return {
        "prompt": zoo.prompts("digits"),
        "num_inference_steps": STEPS,
        "guidance_scale": guidance,
        "generator": [torch.Generator().manual_seed(seed) for seed in range(10)],
    }


@functools.cache
def stock_latents(pipe: Any, guidance: float) -> Tensor:
    latents: Tensor = pipe(**arguments(guidance), output_type="latent").images
    return latents


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [3.0, 7.5])
def test_srds_closes_in_on_the_sequential_images(pipe: Any, guidance: float) -> None:
    reference = stock_latents(pipe, guidance)
    images = decoded(pipe, reference)
    fast = srds_fast.compile(pipe, num_blocks=20, coarse_solver="2m", max_iterations=2, tolerance=0.0, method="srds")
    errors, grey = [], []
    for refinement in fast.stream(**arguments(guidance)):
        errors.append((refinement.latents - reference).abs().flatten(1).mean(1))
        grey.append(float(255 * (decoded(pipe, refinement.latents) - images).abs().mean()))
    assert fast.plan_for(num_inference_steps=STEPS).program().num_waves == 28
    assert srds_fast.program.srds(STEPS, 20, 1).num_waves == 24
    assert grey[1] < 0.2
    assert grey[2] < 0.02
    for iteration in (1, 2):
        assert bool((errors[iteration] < errors[iteration - 1] / 3).all()), "of every sample"


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [3.0, 7.5])
def test_the_default_tolerance_is_kept_by_every_sample(pipe: Any, guidance: float) -> None:
    reference = stock_latents(pipe, guidance)
    fast = srds_fast.compile(pipe, method="srds")
    found = fast(**arguments(guidance), output_type="latent").images
    error = (found - reference).abs().flatten(1).mean(1)
    assert float(error.max()) <= 4e-3
    assert all(fast.report.converged)
    assert fast.report.waves <= 28


def test_exact_is_the_stock_image(pipe: Any) -> None:
    call = {"prompt": "the digit seven", "num_inference_steps": 25, "guidance_scale": 3.0, "output_type": "latent"}
    expected = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    found = srds_fast.compile(pipe, exact=True, method="srds")(
        **call, generator=torch.Generator().manual_seed(0)
    ).images
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.slow
def test_parataa_needs_nine_waves_at_most_and_run_on_is_the_sequential_sampler(pipe: Any) -> None:
    reference = stock_latents(pipe, 1.0)
    fast = srds_fast.compile(pipe, method="parataa", max_iterations=11, tolerance=1e-7)
    errors = [(refinement.latents - reference).abs().flatten(1).mean(1) for refinement in fast.stream(**arguments(1.0))]
    grey = [127.5 * float(error.quantile(0.95)) for error in errors]
    assert all(each < 0.5 for each in grey[8:])  # after wave 9 and every later one
    assert float(errors[-1].max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_collocation_keeps_the_tolerance_in_few_rows(pipe: Any, guidance: float) -> None:
    reference = stock_latents(pipe, guidance)
    fast = srds_fast.compile(pipe, method="collocation")
    found = fast(**arguments(guidance), output_type="latent").images
    assert float((found - reference).abs().flatten(1).mean(1).max()) <= 4e-3
    assert sorted(fast.report.iterations_per_sample)[5] <= 9
    assert fast.report.waves <= 16
