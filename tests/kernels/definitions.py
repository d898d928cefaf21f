"""What tests of several files share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from srds_fast.kernels.common import dispatch
from srds_fast.schedulers.table import NoiseTable
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers.fixed_point.grid import grid_of


@contextmanager
def references() -> Iterator[None]:
    """Within it no kernel runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "interpreted", lambda: False)
        patch.setenv("SRDS_FAST_KERNELS", "torch")
        grid_of.cache_clear()
        yield
    grid_of.cache_clear()


def randomly(*shape: int, seed: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def scan_by_definition(y: Tensor, m: Tensor, table: Tensor, added: Tensor | None, clip: float | None) -> Tensor:
    """The steps of `Scan`, one after another; table: [W, 6], of the window."""
    x, points = y[0], []
    for i, (a, b, c, e, p, q) in enumerate(table):
        f = a * y[i] + b * m[i]
        if clip is not None:
            f = f + e * torch.clamp(p * y[i] + q * m[i], -clip, clip)
        if added is not None:
            f = f + added[i]
        x = f + c * (x - y[i])
        points.append(x)
    return torch.stack(points)


def noise_of(num_steps: int, features: Any) -> NoiseTable:
    """Of steps that do all this."""
    scheduler = DDIMScheduler(clip_sample="clip" in features)
    scheduler.set_timesteps(num_steps)
    noise = noise_table(scheduler)
    numbers = torch.rand(3, num_steps, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if "momentum" in features:
        noise = replace(noise, momentum=0.5 * numbers[0])
    if "noise" in features:
        noise = replace(noise, spread=numbers[1])
    if "scaled" in features:
        noise = replace(noise, input_scale=0.5 + numbers[2])
    return noise
