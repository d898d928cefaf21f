"""Samplers and noise schedules of k-diffusion as they were published, and a denoiser in closed form for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

Model = Callable[..., Tensor]
SIGMA_MIN, SIGMA_MAX = 0.03, 14.6
MEANS = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def denoised(x: Tensor, sigma: Tensor, shift: Tensor | None = None) -> Tensor:
    """The posterior mean of x0 under five Gaussians of deviation 0.3, for rows of any sigmas. shift: moves them."""
    level = sigma[:, None].to(x)
    means = MEANS.to(x)[None] + (0 if shift is None else shift[:, None])
    variance = 0.3**2 + level**2
    away = x[:, None] - means
    weights = (-(away**2).sum(-1) / (2 * variance)).softmax(-1)
    return (weights[..., None] * (means + (0.3**2 / variance)[..., None] * away)).sum(1)


def starting_noise(sigmas: Tensor, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(batch, 8, dtype=torch.float64, generator=draw).to(dtype) * sigmas[0].to(dtype)


def _with_zero(sigmas: Any) -> Tensor:
    return torch.cat([torch.as_tensor(sigmas, dtype=torch.float32), torch.zeros(1)])


def karras(n: int) -> Tensor:
    """Karras et al. 2022, eq. (5), rho = 7."""
    ends = SIGMA_MAX ** (1 / 7), SIGMA_MIN ** (1 / 7)
    return _with_zero((ends[0] + torch.linspace(0, 1, n) * (ends[1] - ends[0])) ** 7)


def exponential(n: int) -> Tensor:
    return _with_zero(torch.linspace(math.log(SIGMA_MAX), math.log(SIGMA_MIN), n).exp())


def beta(n: int) -> Tensor:
    """Lee et al. 2024 (arXiv 2407.12173), on the 1000 levels of Stable Diffusion."""
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    levels = ((1 - abar) / abar).sqrt()
    steps = np.rint(scipy.stats.beta.ppf(1 - np.linspace(0, 1, n, endpoint=False), 0.6, 0.6) * 999)
    return _with_zero(levels[torch.as_tensor(steps).long()])


def align_your_steps(n: int) -> Tensor:
    """Sabour et al. 2024, the published list for Stable Diffusion 1.5, interpolated in log(sigma)."""
    listed = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
    at = np.linspace(0, 1, n + 1)
    found = np.exp(np.interp(at, np.linspace(0, 1, len(listed)), np.log(listed)))
    return _with_zero(found[:-1])


SCHEDULES = {"karras": karras, "exponential": exponential, "beta": beta, "ays": align_your_steps}


def sample_euler(model: Model, x: Tensor, sigmas: Tensor, **extra: Any) -> Tensor:
    """Also DDIM."""
    for here, after in itertools.pairwise(sigmas):
        x0 = model(x, here.to(x).expand(len(x)), **extra)
        x = x + (x - x0) / here * (after - here)
    return x


def sample_dpmpp_2m(model: Model, x: Tensor, sigmas: Tensor, **extra: Any) -> Tensor:
    before: Tensor | None = None
    for i in range(len(sigmas) - 1):
        x0 = model(x, sigmas[i].to(x).expand(len(x)), **extra)
        h = (sigmas[i] / sigmas[i + 1]).log()
        mean = x0
        if before is not None and sigmas[i + 1] > 0:
            r = (sigmas[i - 1] / sigmas[i]).log() / h
            mean = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        x = sigmas[i + 1] / sigmas[i] * x - (-h).expm1() * mean
        before = x0
    return x


def sample_euler_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, eta: float = 1.0, s_noise: float = 1.0, **extra: Any
) -> Tensor:
    for here, after in itertools.pairwise(sigmas):
        x0 = model(x, here.to(x).expand(len(x)), **extra)
        up = min(after, eta * (after**2 * (here**2 - after**2) / here**2) ** 0.5)
        down = (after**2 - up**2) ** 0.5
        x = x + (x - x0) / here * (down - here)
        if after > 0:
            x = x + torch.randn_like(x) * s_noise * up
    return x


def sample_heun(model: Model, x: Tensor, sigmas: Tensor, **extra: Any) -> Tensor:
    """Karras et al. 2022, algorithm 1."""
    for here, after in itertools.pairwise(sigmas):
        slope = (x - model(x, here.to(x).expand(len(x)), **extra)) / here
        there = x + slope * (after - here)
        if after > 0:
            other = (there - model(there, after.to(x).expand(len(x)), **extra)) / after
            there = x + (slope + other) / 2 * (after - here)
        x = there
    return x


SAMPLERS = {
    "euler": sample_euler,
    "ddim": sample_euler,
    "dpmpp_2m": sample_dpmpp_2m,
    "euler_ancestral": sample_euler_ancestral,
    "heun": sample_heun,
}
