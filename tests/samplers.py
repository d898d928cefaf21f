"""Schedulers of every kind with a network that goes with them: what a method must be exact on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from problems import GaussianMixture, LinearOde, noise, scheduler
from torch import Tensor

from srds_fast import sample

Denoiser = Callable[[Tensor, Tensor], Tensor]
DIMENSIONS = 16
MIXTURE, LINEAR = GaussianMixture.random(DIMENSIONS), LinearOde.random(DIMENSIONS)


def mixture(x: Tensor, t: Tensor) -> Tensor:
    """Predicts eps; timesteps of any dtype."""
    return MIXTURE(x, t.long())


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (0.5 + t.to(x)[:, None] / 2000)


# scheduler, network, eta
SAMPLERS: dict[str, tuple[Any, Denoiser, float]] = {
    "ddim": (scheduler(), mixture, 0.0),
    "ddim-linear": (scheduler(), LINEAR, 0.0),
    "ddim-clip": (DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=False), mixture, 0.0),
    "ddim-v": (scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True), velocity, 0.0),
    "ddim-eta": (scheduler(), mixture, 0.7),
    "ddim-eta-clip": (DDIMScheduler(), mixture, 1.0),
    "ddpm": (DDPMScheduler(), mixture, 0.0),
    "ddpm-unclipped": (DDPMScheduler(clip_sample=False, variance_type="fixed_large"), mixture, 0.0),
    "dpm": (DPMSolverMultistepScheduler(), mixture, 0.0),
    "euler": (EulerDiscreteScheduler(), mixture, 0.0),
    "euler-ancestral": (EulerAncestralDiscreteScheduler(), mixture, 0.0),
    "lms": (LMSDiscreteScheduler(), mixture, 0.0),
    "pndm": (PNDMScheduler(skip_prk_steps=True), mixture, 0.0),
    "sa": (SASolverScheduler(), mixture, 0.0),
    "unipc": (UniPCMultistepScheduler(solver_order=3), mixture, 0.0),
    "flow": (FlowMatchEulerDiscreteScheduler(), velocity, 0.0),
}


def run(
    name: str, num_steps: int, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64, **how: Any
) -> Tensor:
    """A sample by one of SAMPLERS, with its own noise."""
    stock, denoiser, eta = SAMPLERS[name]
    stock.set_timesteps(num_steps)
    x = noise(batch, DIMENSIONS, seed=seed, dtype=dtype) * float(getattr(stock, "init_noise_sigma", 1.0))
    how |= {"eta": eta, "generator": torch.Generator().manual_seed(seed)}
    return sample(lambda x, t: denoiser(x, t).to(x.dtype), x, stock, num_steps, **how).sample
