"""What a fixed-point method knows of the grid before its first wave: responses, interpolation, the sweep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.affine_scan import Coefficients
from ..kernels.affine_scan.prepared import PreparedScan
from ..methods import FixedPoint
from ..noise import NoiseTable
from ..program import Sweeps
from ..steps import Like, first_order

# points of which a local polynomial is made: cubic
LOCAL = 4


class Nodes(NamedTuple):
    """The points that were evaluated for a sweep.

    Attributes:
        first, last: the first and the last one.
        positions: of all, on the device.
        weights: [N - first, nodes], of the nodes in every point from the first on; None: they are all points.
    """

    first: int
    last: int
    positions: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class Grid:
    """Columns are [N, 1, ...] and broadcast over states [samples, ...]; all on the device, in the dtype of the state.

    Attributes:
        p, q: x0 = p x + q m.
        response: by how much the network's output at a point moves with the point.
        input_scale: the network sees input_scale * x; None: x itself.
        momentum: of multistep steps, or None.
        spread: of stochastic steps, or None.
        growth: [N + 1, 1, ...], by how much a method's first guess grows from the starting noise on.
        scan: the sweep.
        rows: of each wave, the positions of its rows.
        nodes: of each sweep, by the number of its last wave.
        variance: [N] float64, of DDPM's posterior at each step.
        weight: [N + 1, 1], what a point's movement means for the sample: 1 for the last, less where states are larger.
    """

    p: Tensor
    q: Tensor
    response: Tensor
    input_scale: Tensor | None
    momentum: Tensor | None
    spread: Tensor | None
    growth: Tensor
    scan: PreparedScan
    rows: tuple[Tensor, ...]
    nodes: dict[int, Nodes]
    variance: Tensor
    weight: Tensor


@lru_cache(maxsize=32)
def grid_of(noise: NoiseTable, program: Sweeps, options: FixedPoint, like: Like, *, scaled: bool) -> Grid:
    """The grid of a run for states like these; scaled: the network's input is to be."""

    def column(values: Tensor) -> Tensor:
        return values.to(like.device, like.dtype).reshape(-1, *[1] * like.ndim)

    data_std = _data_std(noise, options)
    response, c = responses(noise, data_std)
    flows = data_std is not None and math.isfinite(data_std)
    growth = torch.cat([c.new_ones(1), c.cumprod(0) if flows else torch.ones_like(c)])
    steps = [_step(noise, index, float(c[index])) for index in range(noise.num_steps)]
    return Grid(
        column(noise.p),
        column(noise.q),
        column((response - noise.p) / noise.q),
        column(noise.input_scale) if scaled and bool((noise.input_scale != 1).any()) else None,
        None if noise.momentum is None else column(noise.momentum),
        None if noise.spread is None else column(noise.spread),
        column(growth),
        PreparedScan(steps, like.dtype, like.device, like.ndim, noise.clip, options.order),
        tuple(torch.tensor(positions, device=like.device) for positions in program.positions),
        _nodes(noise, program, like, slides=options.window is not None),
        posterior_variance(noise),
        _weight(noise).to(like.device, like.dtype)[:, None],
    )


def _data_std(noise: NoiseTable, options: FixedPoint) -> float | None:
    if options.data_std != "auto":
        return options.data_std
    return 1.0 if noise.clip is None else 0.5 * noise.clip


def responses(noise: NoiseTable, data_std: float | None) -> tuple[Tensor, Tensor]:
    """How x0 and how a step respond to the state they depart from, for Gaussian data; float64, [N] each.

    x0 of N(0, s^2): J = alpha s^2 / (alpha^2 s^2 + sigma^2), and the step, sigma'/sigma x + (alpha' - sigma'/sigma
    alpha) x0, has c = sigma'/sigma + (alpha' - sigma'/sigma alpha) J: the rotation of variance-preserving schedules at
    s = 1, alpha'/alpha as s goes to infinity. Picard iteration (None) takes c = 1 instead.
    """
    keep = noise.sigma_next / noise.sigma
    gain = noise.alpha_next - keep * noise.alpha
    if data_std is None:
        return torch.zeros_like(keep), torch.ones_like(keep)
    # both parts divided by s^2: it may be infinite; where alpha is 0 x0 does not respond
    response = torch.where(noise.alpha == 0, 0.0, noise.alpha / (noise.alpha**2 + (noise.sigma / data_std) ** 2))
    if noise.momentum is not None:
        gain = gain + noise.momentum
    return response, keep + gain * response


def posterior_variance(noise: NoiseTable) -> Tensor:
    """[N] float64: of DDPM's posterior at each step, (sigma' / sigma)^2 (sigma^2 - (alpha / alpha')^2 sigma'^2).

    For alpha^2 + sigma^2 = 1 it is (1 - abar') / (1 - abar) (1 - abar / abar').
    """
    arrives = noise.sigma_next**2 if noise.spread is None else noise.sigma_next**2 + noise.spread**2
    return arrives / noise.sigma**2 * (noise.sigma**2 - (noise.alpha / noise.alpha_next) ** 2 * arrives)


def _weight(noise: NoiseTable) -> Tensor:
    """[N + 1] float64: of the last state's standard deviation in those of all, for data of deviation 1."""
    arrives = noise.alpha_next[-1:] ** 2 + noise.sigma_next[-1:] ** 2
    level = torch.cat([noise.alpha**2 + noise.sigma**2, arrives]).sqrt()
    return level[-1] / level


def _step(noise: NoiseTable, index: int, c: float) -> Coefficients:
    """A step, its momentum and fresh noise apart: they come as the scan's noise."""
    a, b, e, _ = first_order(noise, index, index + 1)
    return Coefficients(a, b, c, 1.0, e, noise.numbers["p"][index], noise.numbers["q"][index])


def _nodes(noise: NoiseTable, program: Sweeps, like: Like, *, slides: bool) -> dict[int, Nodes]:
    # along the angle the output is smoother than along the steps or along the log-SNR
    way = torch.atan2(noise.sigma, noise.alpha)
    if not bool((way.diff() < -1e-9).all()):
        way = -torch.arange(noise.num_steps, dtype=torch.float64)
    found: dict[int, Nodes] = {}
    positions: tuple[int, ...] = ()
    for number, wave in enumerate(program):
        positions += program.positions[number]
        if not (slides or wave.boundaries):  # a part of a wave that was too wide
            continue
        first, last, weights = positions[0], positions[-1], None
        if len(positions) < last + 1 - first:
            weights = interpolation(way[list(positions)], way[first:]).to(like.device, like.dtype)
        found[number] = Nodes(first, last, torch.tensor(positions, device=like.device), weights)
        positions = ()
    return found


def interpolation(nodes: Tensor, points: Tensor) -> Tensor:
    """Weights of the values at nodes in the values at points, [points, nodes]: cubic through the four around each.

    Args:
        nodes: [K], descending; fewer than four make a polynomial of lower degree.
        points: [P].
    """
    size = min(LOCAL, len(nodes))
    after = torch.searchsorted(-nodes, -points, right=True)
    begin = (after - size // 2).clamp(0, len(nodes) - size)
    index = begin[:, None] + torch.arange(size)
    around = nodes[index]  # [P, size]
    away = points[:, None, None] - around[:, None, :]  # of node b, once for each node a
    apart = around[:, :, None] - around[:, None, :]
    itself = torch.eye(size, dtype=torch.bool)
    factors = torch.where(itself, 1.0, away / torch.where(itself, 1.0, apart))
    return torch.zeros(len(points), len(nodes), dtype=nodes.dtype).scatter_(1, index, factors.prod(-1))
