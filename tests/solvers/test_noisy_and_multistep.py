"""Fine solvers with fresh noise and with history: the stock sample, and closer to it with every iteration."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from problems import GaussianMixture, noise
from thinned import by_pairs
from torch import Tensor

import srds_fast

MIXTURE = GaussianMixture.random()
SCHEDULERS = {
    "ddim-trailing": DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=False, clip_sample_range=1.5),
    "euler": EulerDiscreteScheduler(),
    "dpm": DPMSolverMultistepScheduler(),
    "dpm-heun-karras": DPMSolverMultistepScheduler(solver_type="heun", use_karras_sigmas=True),
    "dpm-to-sigma-min": DPMSolverMultistepScheduler(final_sigmas_type="sigma_min", lower_order_final=False),
    "dpm-order-1": DPMSolverMultistepScheduler(solver_order=1),
    "ddpm": DDPMScheduler(),
    "ddpm-unclipped": DDPMScheduler(clip_sample=False, variance_type="fixed_large"),
    "ddim-eta": DDIMScheduler(clip_sample=False),
    "ddim-eta-clip": DDIMScheduler(),
    "euler-ancestral": EulerAncestralDiscreteScheduler(timestep_spacing="trailing"),
}
ETA = {"ddim-eta": 1.0, "ddim-eta-clip": 0.5}


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    return MIXTURE(x, t.long())


def start(name: str, num_steps: int) -> Tensor:
    scheduler = SCHEDULERS[name]
    scheduler.set_timesteps(num_steps)
    return noise(3, 64) * float(scheduler.init_noise_sigma)


def stock(name: str, num_steps: int, generator: torch.Generator) -> Tensor:
    """The loop of a diffusers pipeline, one step after another."""
    scheduler, x = SCHEDULERS[name], start(name, num_steps)
    options: dict[str, Any] = {"eta": ETA[name]} if name in ETA else {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        m = denoiser(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(m.to(x.dtype), t, x, **options).prev_sample
    return x


def sample(name: str, num_steps: int, generator: Any = None, **settings: Any) -> srds_fast.SampleResult:
    generator = generator or torch.Generator().manual_seed(5)
    options = {"eta": ETA.get(name, 0.0), "generator": generator, **settings}
    return srds_fast.sample(denoiser, start(name, num_steps), SCHEDULERS[name], num_steps, **options)


@pytest.mark.parametrize(
    ("name", "num_steps", "settings"),
    by_pairs(
        list(SCHEDULERS), [1, 7, 20], [{"method": "sequential"}, {"exact": True}, {"exact": True, "pipelined": False}]
    ),
)
def test_equals_the_stock_loop(name: str, num_steps: int, settings: dict[str, Any]) -> None:
    stock_noise, our_noise = (torch.Generator().manual_seed(5) for _ in range(2))
    expected = stock(name, num_steps, stock_noise)
    found = sample(name, num_steps, our_noise, **settings).sample
    # only DDIM and DDPM do not round the sample to float32
    tolerance = 1e-10 if name.startswith("dd") else 1e-6
    scale = max(float(expected.abs().max()), float(start(name, num_steps).abs().max()))
    assert float((found - expected).abs().max()) <= tolerance * scale
    assert torch.equal(our_noise.get_state(), stock_noise.get_state())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_tolerance_bounds_the_error(name: str) -> None:
    expected = sample(name, 40, method="sequential").sample
    result = sample(name, 40)
    errors = (result.sample - expected).abs().flatten(1).mean(1)
    assert float(errors.max()) <= 4e-3
    assert result.report.iterations < result.report.num_blocks or name == "ddim-eta-clip"


def test_generators_of_the_samples_and_finished_samples_keep_their_noise() -> None:
    """Samples stop at different iterations; each must keep the noise drawn from its own generator."""

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]

    expected = sample("ddpm", 40, generators(), method="sequential").sample
    result = sample("ddpm", 40, generators(), tolerance=1e-5)
    assert len(set(result.report.iterations_per_sample)) > 1
    assert float((result.sample - expected).abs().flatten(1).mean(1).max()) <= 1e-5
    together = sample("ddpm", 40, method="sequential").sample
    assert not torch.allclose(together, expected)


def test_noisy_steps_jump_in_first_order_by_default() -> None:
    def error(**settings: Any) -> float:
        expected = sample("ddpm-unclipped", 50, method="sequential").sample
        return float((sample("ddpm-unclipped", 50, max_iterations=1, **settings).sample - expected).abs().mean())

    assert error() == error(coarse_solver="ddim")
    assert error() < error(coarse_solver="2m") / 4


def test_eta_is_ddims_alone_and_generators_fit_the_batch() -> None:
    with pytest.raises(srds_fast.UnsupportedScheduler, match="takes no eta"):
        srds_fast.sample(denoiser, noise(1, 64), DDPMScheduler(), 5, eta=0.5)
    with pytest.raises(srds_fast.InvalidArgument, match="eta is -1"):
        srds_fast.sample(denoiser, noise(1, 64), DDIMScheduler(), 5, eta=-1)
    with pytest.raises(srds_fast.InvalidArgument, match="2 generators for 3 samples"):
        sample("ddpm", 5, [torch.Generator(), torch.Generator()])
