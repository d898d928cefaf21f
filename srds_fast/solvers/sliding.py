"""What the methods with a sliding window share: ParaDiGMS, ParaTAA and ParaSolver."""

from __future__ import annotations

from torch import Tensor

from ..schedulers.table import NoiseTable


def posterior_std(noise: NoiseTable, bounds: tuple[int, ...]) -> Tensor:
    """[len(bounds) - 1] float64: standard deviation of DDPM's posterior from each of these grid positions to the next.

    Its variance is (sigma' / sigma)^2 (sigma^2 - (alpha / alpha')^2 sigma'^2), which for alpha^2 + sigma^2 = 1 is
    (1 - abar') / (1 - abar) (1 - abar / abar').
    """
    starts, stops = list(bounds[:-1]), [bound - 1 for bound in bounds[1:]]
    alpha, sigma, alpha_next = noise.alpha[starts], noise.sigma[starts], noise.alpha_next[stops]
    arrives = noise.sigma_next**2 if noise.spread is None else noise.sigma_next**2 + noise.spread**2
    variance = arrives[stops] / sigma**2 * (sigma**2 - (alpha / alpha_next) ** 2 * arrives[stops])
    return variance.clamp(min=0).sqrt()


def num_within(error: Tensor, bound: Tensor) -> int:
    """How many states, from the first on, are within their bound [states] in all samples. Waits for the device."""
    largest, bounds = error.amax(1).tolist(), bound.tolist()
    # NaN is within no bound
    beyond = (index for index, most in enumerate(bounds) if not largest[index] <= most)
    return next(beyond, len(bounds))
