"""Networks that change fast: mixtures of few narrow Gaussians in closed form, and a plain function under a clip.

Between the modes of such a mixture a small error decides where a sample ends, and under a clip what a step answers
changes from one moment to the next. A method that refines samples has little to go by there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .problems import Problem


def modes(
    samples: int,
    count: int = 8,
    size: int = 8,
    std: float = 0.1,
    scheduler: Callable[[], Any] = lambda: DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    seed: int = 0,
) -> Problem:
    """A mixture of `count` Gaussians of this standard deviation, their centres evenly in [-1, 1]^size; float64.

    Args:
        scheduler: one that predicts eps, or FlowMatchEulerDiscreteScheduler, whose network predicts the velocity.
        seed: of centres and starting noise.
    """
    generator, made = torch.Generator().manual_seed(seed), scheduler()
    centres = 2 * torch.rand(count, size, generator=generator, dtype=torch.float64) - 1
    x = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    flows = isinstance(made, FlowMatchEulerDiscreteScheduler)
    kept = None if flows else made.alphas_cumprod.double()

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        if kept is None:
            sigma = t.to(x)[:, None] / 1000
            alpha = 1 - sigma
        else:
            alpha, sigma = kept[t.long(), None].sqrt(), (1 - kept[t.long(), None]).sqrt()
        variance = sigma**2 + (alpha * std) ** 2
        logits = (alpha * x @ centres.T - alpha**2 / 2 * (centres**2).sum(1)) / variance
        # the noise expected in x, which is alpha times a sample of the mixture plus sigma times the noise
        mean = logits.softmax(1) @ centres
        eps = sigma * (x - alpha * mean) / variance
        if kept is None:
            return eps - mean - alpha * std**2 * (x - alpha * mean) / variance
        return eps

    return Problem(f"{count} modes", denoiser, x, {}, made)


def multistep() -> Any:
    """DPM-Solver++(2M)."""
    return DPMSolverMultistepScheduler(timestep_spacing="trailing")


def clipped(samples: int, size: int = 16, seed: int = 0) -> Problem:
    """tanh as the network, the noisier the steeper, under the default clip of DDIMScheduler; float32."""
    x = torch.randn(samples, size, generator=torch.Generator().manual_seed(seed))

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x * (0.1 + t.to(x)[:, None] / 1000))

    return Problem("tanh under a clip", denoiser, x, {}, DDIMScheduler())
