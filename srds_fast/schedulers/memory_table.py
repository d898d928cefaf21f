"""Tables of linear schedulers that need more of earlier steps than one x0: PNDM, UniPC, solvers of order 3.

Their steps are the triangles that were read. What a parallel method guesses, it makes of x0 and eps, so the table has
to know these too. Of what networks predict, the first is taken that the step itself reports, else the one with which
the steps lead from level to level: if x0 and eps are the same everywhere, x_{i+1} is alpha * x0 + sigma * eps at the
next level, whatever a step makes of its history.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .levels import FAR, parametrizations
from .memory import minimal_memory
from .own_loop import StepCall, copy_scheduler
from .reader import Triangles, draw_dtypes, read
from .refusal import refused
from .step_noise import StepNoise
from .table import NoiseTable

# relative size of a number that is rounding
ROUNDING = 1e-12
# of what steps compute in float32 and arrive at
SINGLE_ROUNDING = 1e-6


def table_with_memory(scheduler: Any, call: StepCall, levels: Tensor) -> NoiseTable:
    """The table of these steps. levels: [T, 2], alpha and sigma where each turn calls the network.

    Raises UnsupportedScheduler if the steps do not lead from level to level.
    """
    scheduler = copy_scheduler(scheduler)

    def read_from(start: int) -> Triangles:
        return read(scheduler, call, start).with_one_draw()

    as_read = read(scheduler, call)
    triangles = as_read.with_one_draw()
    p, q = _weights_of_x0(scheduler, triangles, levels).T
    alpha, sigma = levels.T
    alpha_next, sigma_next = torch.cat((levels[1:], _arrivals(triangles, levels, p, q)[-1:])).T
    draws, spread = triangles.own_noise()
    # a stochastic step arrives at the next level with its noise
    sigma_next = (sigma_next**2 - spread**2).clamp(min=0).sqrt()
    sigma_next = torch.where(sigma_next < SINGLE_ROUNDING * sigma, 0.0, sigma_next)
    noisy = bool(draws.any())
    return NoiseTable(
        scheduler.timesteps.cpu()[: triangles.turns],
        alpha,
        sigma,
        alpha_next,
        sigma_next,
        p,
        q,
        (1 - alpha * p) / sigma,
        -alpha * q / sigma,
        input_scale=triangles.input_scale,
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        spread=spread if noisy else None,
        draws=draws if noisy else None,
        draw_dtypes=draw_dtypes(scheduler, call, triangles.turns) if noisy else {},
        step_noise=StepNoise.where_needed(scheduler, call, as_read),
        triangles=triangles,
        memory=minimal_memory(triangles),
        read_from=read_from,
    )


def _weights_of_x0(scheduler: Any, triangles: Triangles, levels: Tensor) -> Tensor:
    """Weights [T, 2] of x and m in the predicted x0."""
    reported = torch.stack((triangles.x0_of_x, triangles.x0_of_m), 1)
    candidates = [reported, *_preconditioned(levels, scheduler.config.get("sigma_data")), *parametrizations(levels)]
    usable = [each for each in candidates if bool(each.isfinite().all()) and bool((each[:, 1] != 0).all())]
    distances = [_distance(triangles, levels, each) for each in usable]
    if not distances or min(distances) > FAR:
        raise refused(scheduler, "its steps do not lead from one of its noise levels to the next")
    # equal ones but for rounding: the first
    best = min(range(len(usable)), key=lambda each: (round(math.log10(distances[each] + ROUNDING)), each))
    return usable[best]


def _preconditioned(levels: Tensor, data_std: float | None) -> Iterator[Tensor]:
    """Of networks as in Karras et al. 2022, section 5, for data of this standard deviation: of eps and of v."""
    if data_std is not None:
        variance = levels[:, 1] ** 2 + data_std**2
        for sign in (1, -1):
            yield torch.stack((data_std**2 / variance, sign * data_std * levels[:, 1] / variance.sqrt()), 1)


def _distance(triangles: Triangles, levels: Tensor, x0: Tensor) -> float:
    """Median relative difference of where steps arrive, to the next levels."""
    if triangles.turns == 1:
        return 0.0
    arrives = _arrivals(triangles, levels, *x0.T)[:-1]
    return float(((arrives - levels[1:]).norm(dim=1) / levels[1:].norm(dim=1)).median())


def _arrivals(triangles: Triangles, levels: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """alpha and sigma, [T, 2], that each step arrives at if x0 and eps have been the same in all turns so far."""
    unit = torch.tensor([[1.0, 0.0]], dtype=torch.float64, device="cpu")
    outputs = (unit - p[:, None] * levels) / q[:, None]
    alpha, sigma = (triangles.of_x @ levels + triangles.of_m @ outputs).T
    return torch.stack((alpha, (sigma**2 + (triangles.of_z**2).sum(1)).sqrt()), 1)
