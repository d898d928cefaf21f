"""A trajectory that leads to a guessed sample: where a method may begin that refines all points of the grid."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..caches import cached
from .table import NoiseTable


def trajectory_to(noise: NoiseTable, x: Tensor, sample: Tensor, draws: Tensor | None) -> Tensor:
    """The states of the steps, if the network predicted this sample at each of them.

    Args:
        x: starting noise, [batch, ...].
        sample: the x0 that is guessed, [batch, ...].
        draws: the noise of each step, [N, batch, ...]; None: the steps add none.

    Returns:
        [N + 1, batch, ...], in the dtype of x.
    """
    parts = torch.cat([x[None], sample[None].to(x), *([] if draws is None else [draws.to(x)])])
    found: Tensor = torch.tensordot(_weights(noise, len(parts)).to(x), parts, dims=1)
    return found


@cached
def _weights(noise: NoiseTable, parts: int) -> Tensor:
    """[N + 1, parts] float64: what each state has of the starting noise, of the sample, and of the noise of each step.

    Every step is linear in these, so one run of the steps over unit vectors gives all weights. parts: 2 without noise.
    """
    steps = noise.num_steps
    clean = torch.zeros(parts, dtype=torch.float64, device="cpu")
    clean[1] = 1.0
    states, carried = [torch.zeros_like(clean)], None
    states[0][0] = 1.0
    unclipped, column = replace(noise, clip=None), noise.numbers
    for step in range(steps):
        x, z = states[-1], torch.zeros_like(clean)
        z[2 + step : 3 + step] = 1.0
        m = (clean - column["p"][step] * x) / column["q"][step]
        after, carried = unclipped.step(step, x, m, carried, z)
        states.append(after)
    return torch.stack(states)
