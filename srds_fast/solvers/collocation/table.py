"""What collocation knows of the grid before its first wave: steps, expected responses, interpolation of surprises."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ...caches import cached
from ...kernels.common.clamping import range_of
from ...kernels.secant_sweep.table import LOCAL, Interpolation, SecantTable, SecantWave, around, step_numbers
from ...schedulers.steps import TensorSpec, fine_step, first_order
from ...schedulers.table import NoiseTable
from ..fixed_point.grid import by_wave, look_back_of, propagation, responses
from ..fixed_point.program import Sweeps
from ..on_demand import mapped

# Bound of |x0's response that secants add to the expected one|. At high noise the network's output is the noise in x,
# so that x0 may move by sigma / alpha of what x moves by; 20 where alpha is nearly zero.
LARGEST_RESPONSE, LARGEST_RATIO = 3.0, 20.0
# Movements of less than this, in standard deviations of the states, teach nothing: an eleventh of the default tolerance
SMALLEST_MOVEMENT = 2e-4
# Standard deviation of the data that expected responses are exact for. Data have 1 as latents are scaled, but given the
# state, the text or the observation much less is open. Under a clip it is a share of its bound.
DATA_STD, DATA_STD_OF_CLIP = 0.6, 0.3


@cached
def secant_table(
    noise: NoiseTable,
    program: Sweeps,
    data_std: float | Literal["auto"],
    history: int,
    regularisation: float,
    spec: TensorSpec,
    *,
    scaled: bool,
) -> SecantTable:
    """The table for states like these; scaled: the network's input is multiplied with the input scale."""
    if data_std == "auto":
        data_std = DATA_STD if noise.clip is None else DATA_STD_OF_CLIP * range_of(noise.clip)
    gain, c = responses(noise, data_std)
    looks_back = noise.triangles is not None
    steps = [
        fine_step(noise, index) if looks_back else first_order(noise, index, index + 1)
        for index in range(noise.num_steps)
    ]
    a, b, e = (
        torch.tensor([getattr(step, name) for step in steps], dtype=torch.float64, device="cpu") for name in "abc"
    )
    level = (noise.alpha**2 + noise.sigma**2).sqrt()
    at_end = (noise.alpha_next[-1:] ** 2 + noise.sigma_next[-1:] ** 2).sqrt()
    ratio = (noise.sigma / noise.alpha).clamp(max=LARGEST_RATIO)
    to_the_end = torch.cat([c.flip(0).cumprod(0).flip(0)[1:], c.new_ones(1)])
    by_x0 = e if noise.momentum is None else e + noise.momentum

    def column(values: Tensor) -> Tensor:
        return values.to(spec.device, spec.dtype)[:, None, None]

    look_back = look_back_of(noise, spec)
    momentum, spread = (None if each is None or looks_back else column(each) for each in (noise.momentum, noise.spread))
    steps_of = column(a), column(b), column(e), column(noise.p), column(noise.q)
    response = column((gain - noise.p) / noise.q)
    largest = column((LARGEST_RESPONSE + ratio) / (level * noise.q.abs()))
    smallest = column((SMALLEST_MOVEMENT * level) ** 2)
    reach = to_the_end * (b + by_x0 * noise.q)
    if noise.triangles is not None:
        reach = propagation(noise, data_std)[-1] @ noise.triangles.of_m
    reach = reach.abs().to(spec.device, spec.dtype)[:, None]
    return SecantTable(
        *steps_of,
        clip=noise.clip,
        momentum=momentum,
        spread=spread,
        response=response,
        largest=largest,
        smallest=smallest,
        input_scale=spec.column(noise.input_scale) if scaled and bool((noise.input_scale != 1).any()) else None,
        growth=spec.column(_growth(noise, gain)),
        weight=(at_end / torch.cat([level, at_end])).to(spec.device, spec.dtype)[:, None],
        reach=reach,
        rows=mapped(partial(torch.tensor, device=spec.device), program.positions),
        waves=by_wave(program, partial(_waves, noise, program, spec)),
        history=history,
        regularisation=regularisation,
        numbers=step_numbers([*steps_of, response, largest, smallest, momentum, spread, reach]),
        look_back=look_back,
    )


def _growth(noise: NoiseTable, gain: Tensor) -> Tensor:
    """The sampler's path from 1, without noise, for Gaussian data: x0 is gain * x; float64, [N + 1]."""
    if noise.triangles is not None:
        by_point = noise.triangles.of_x + noise.triangles.of_m * ((gain - noise.p) / noise.q)
        path = torch.ones(noise.num_steps + 1, dtype=torch.float64, device="cpu")
        for index in range(noise.num_steps):
            path[index + 1] = by_point[index] @ path[:-1]  # what lies ahead has no weight
        return path
    keep = noise.sigma_next / noise.sigma
    momentum = torch.zeros_like(keep) if noise.momentum is None else noise.momentum
    x, x0_before, found = 1.0, None, [1.0]
    for index, (k, j, m) in enumerate(zip(keep.tolist(), gain.tolist(), momentum.tolist(), strict=True)):
        x0 = j * x
        x = k * x + (float(noise.alpha_next[index]) - k * float(noise.alpha[index])) * x0
        x += 0.0 if x0_before is None else m * (x0 - x0_before)
        x0_before = x0
        found.append(x)
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def _waves(noise: NoiseTable, program: Sweeps, spec: TensorSpec) -> Iterator[tuple[int, SecantWave]]:
    # along the angle the output is smoother than along the steps or along the log-SNR
    way = torch.atan2(noise.sigma, noise.alpha)
    if not bool((way.diff() < -1e-9).all()):
        way = -torch.arange(noise.num_steps, dtype=torch.float64, device="cpu")
    seen: set[int] = set()
    positions: tuple[int, ...] = ()

    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=spec.device)

    for number, wave in enumerate(program):
        positions += program.positions[number]
        if not wave.boundaries:  # a part of a wave that was too wide
            continue
        first, full = positions[0], len(positions) == noise.num_steps - positions[0]
        is_node = [not seen or position in seen for position in positions]
        nodes = [row for row, found_before in enumerate(is_node) if found_before]
        new = [row for row, found_before in enumerate(is_node) if not found_before]
        between, of_nodes = (
            None,
            (torch.zeros(0, dtype=torch.float32, device="cpu"), torch.zeros(0, dtype=torch.float32, device="cpu")),
        )
        if full:
            nodes = []
        if nodes:
            at, points = way[[positions[row] for row in nodes]], way[positions[nodes[0]] :]
            weights = cubic(at, points)
            of_nodes = weights, weights - _linear(at, points)
            between = Interpolation(
                positions[nodes[0]],
                index(nodes),
                *(each.to(spec.device, spec.dtype) for each in of_nodes),
            )
        next_rows = torch.full((noise.num_steps + 1,), -1, dtype=torch.int32, device="cpu")
        following = program.positions[number + 1] if number + 1 < len(program) else ()
        next_rows[list(following)] = torch.arange(len(following), dtype=torch.int32, device="cpu")
        yield (
            number,
            SecantWave(
                first,
                index(list(positions)),
                between,
                index(new),
                index([positions[row] for row in new]),
                full,
                around(positions, new, nodes, *of_nodes, noise.num_steps).to(spec.device, spec.dtype),
                index(list(following)) if following else None,
                next_rows.to(spec.device),
            ),
        )
        seen |= set(positions)
        positions = ()


def cubic(nodes: Tensor, points: Tensor) -> Tensor:
    """Weights of descending nodes at points, [points, nodes]: cubic through the four around, or of lower degree."""
    size = min(LOCAL, len(nodes))
    after = torch.searchsorted(-nodes, -points, right=True)
    begin = (after - size // 2).clamp(0, len(nodes) - size)
    index = begin[:, None] + torch.arange(size, device="cpu")
    near = nodes[index]  # [P, size]
    away = points[:, None, None] - near[:, None, :]  # of node b, once for each node a
    apart = near[:, :, None] - near[:, None, :]
    itself = torch.eye(size, dtype=torch.bool, device="cpu")
    factors = torch.where(itself, 1.0, away / torch.where(itself, 1.0, apart))
    return torch.zeros(len(points), len(nodes), dtype=nodes.dtype, device="cpu").scatter_(1, index, factors.prod(-1))


def _linear(nodes: Tensor, points: Tensor) -> Tensor:
    """Weights [points, nodes] of the values at descending nodes [K] in a piecewise linear curve through them."""
    weights = torch.zeros(len(points), len(nodes), dtype=nodes.dtype, device="cpu")
    if len(nodes) == 1:
        return weights.fill_(1.0)
    after = torch.searchsorted(-nodes, -points, right=True).clamp(1, len(nodes) - 1)
    share = (points - nodes[after - 1]) / (nodes[after] - nodes[after - 1])
    return weights.scatter_(1, after[:, None] - 1, 1 - share[:, None]).scatter_(1, after[:, None], share[:, None])
