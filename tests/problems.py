"""Denoising problems with known answers, in closed form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor


def scheduler(**config: object) -> DDIMScheduler:
    """DDIM without clipping, the scheduler of the closed-form problems."""
    return DDIMScheduler(**{"clip_sample": False, **config})


@functools.cache
def alphas_cumprod() -> Tensor:
    """Of `scheduler()`, which would take as long to make at every network call as the network itself."""
    return scheduler().alphas_cumprod


def noise_level(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """alpha and sigma of `scheduler()` at timesteps t, [rows, 1]."""
    abar = alphas_cumprod()[t].to(dtype)[:, None]
    return abar.sqrt(), (1 - abar).sqrt()


@dataclass(frozen=True)
class LinearOde:
    """Data N(mean, covariance): the optimal eps is linear in x, so every step is a known affine map."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def random(cls, dimensions: int = 6, seed: int = 0) -> LinearOde:
        generator = torch.Generator().manual_seed(seed)
        factor = torch.randn(dimensions, dimensions, dtype=torch.float64, generator=generator) / dimensions**0.5
        return cls(torch.randn(dimensions, dtype=torch.float64, generator=generator), factor @ factor.T)

    def gain(self, alpha: float, sigma: float) -> Tensor:
        """The matrix K with eps(x) = K (x - alpha * mean)."""
        identity = torch.eye(len(self.mean), dtype=torch.float64)
        return sigma * torch.linalg.inv(sigma**2 * identity + alpha**2 * self.covariance)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        levels = zip(x, *noise_level(t, x.dtype), strict=True)
        mean = self.mean.to(x.dtype)
        return torch.stack([self.gain(float(a), float(s)).to(x.dtype) @ (state - a * mean) for state, a, s in levels])


@dataclass(frozen=True)
class GaussianMixture:
    """Data from an isotropic mixture: the posterior mean of x0, and with it eps, is in closed form and nonlinear."""

    means: Tensor
    spread: float

    @classmethod
    def random(cls, dimensions: int = 64, components: int = 5, seed: int = 0) -> GaussianMixture:
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randn(components, dimensions, dtype=torch.float64, generator=generator), 0.3)

    def __call__(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        """eps at x [rows, dimensions]; `shift` [rows, dimensions] moves the mixture, one way to condition it."""
        alpha, sigma = noise_level(t, x.dtype)
        means = self.means.to(x.dtype)[None] + (0 if shift is None else shift[:, None])
        variance = alpha**2 * self.spread**2 + sigma**2
        away = x[:, None] - alpha[:, :, None] * means
        weights = (-(away**2).sum(-1) / (2 * variance)).softmax(-1)
        shrink = alpha * self.spread**2 / variance
        x0 = (weights[:, :, None] * (means + shrink[:, :, None] * away)).sum(1)
        return (x - alpha * x0) / sigma


def noise(batch: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Starting noise, [batch, *shape]."""
    return torch.randn(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sequential_by_scheduler(
    denoiser: Callable[[Tensor, Tensor], Tensor], x: Tensor, num_steps: int, **config: object
) -> Tensor:
    """The stock way: one network call, one `scheduler.step`, N times."""
    stock = scheduler(**config)
    stock.set_timesteps(num_steps)
    for t in stock.timesteps:
        x = stock.step(denoiser(x, t.expand(len(x))), t, x).prev_sample
    return x
