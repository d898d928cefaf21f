"""What a fixed-point method knows of the grid before its first wave: responses, and the sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import TypeVar

import torch
from torch import Tensor

from ...caches import cached
from ...kernels.common.clamping import range_of
from ...kernels.common.look_back import LookBack
from ...kernels.fixed_point_wave import Scan, ScanStep, Sweep, Table, step_numbers
from ...schedulers.steps import TensorSpec, fine_step, first_order
from ...schedulers.table import NoiseTable
from ..on_demand import OnDemand, mapped
from ..program import LongProgram
from .parameters import Parameters
from .program import Sweeps

Made = TypeVar("Made")
# a step that gains less than this of x0 goes from a level to the same one
SMALLEST_GAIN = 1e-9
# with larger weights than this, what earlier points add is computed in float64: the terms of UniPC with
# predict_x0=False reach 150, and their sums 1
LARGE_WEIGHT = 32.0
# sweeps that mix more than the newest difference
MIXINGS = 5


@cached
def grid_of(
    noise: NoiseTable, program: Sweeps, options: Parameters, spec: TensorSpec, *, scaled: bool
) -> tuple[Table, Tensor]:
    """What sweeps read, for states like these, and by how much a first guess grows from the starting noise on.

    scaled: the network's input is multiplied with the input scale. The growth is [N + 1, 1, ...].
    """
    data_std = data_std_of(noise, options)
    _, c = responses(noise, data_std)
    flows = data_std is not None and math.isfinite(data_std)
    growth = torch.cat([c.new_ones(1), c.cumprod(0) if flows else torch.ones_like(c)])
    # the scan is given fresh noise, and what steps take of earlier ones, as additions
    steps = []
    for index, (response_of_step, p, q) in enumerate(
        zip(c.tolist(), noise.numbers["p"], noise.numbers["q"], strict=True)
    ):
        a, b, e, _ = first_order(noise, index, index + 1) if noise.triangles is None else fine_step(noise, index)
        steps.append(ScanStep(a, b, response_of_step, e, p, q))
    reach = None if noise.triangles is None else propagation(noise, data_std).tril(-1)
    scan = Scan(steps, spec.dtype, spec.device, spec.ndim, noise.clip, options.order, reach)
    look_back = look_back_of(noise, spec)
    momentum, spread = (
        None if each is None or look_back is not None else spec.column(each) for each in (noise.momentum, noise.spread)
    )
    everywhere = torch.arange(noise.num_steps, device=spec.device)
    rows = mapped(partial(_part, everywhere), program.positions)
    # standard deviations of the states, for data of deviation 1
    arrives = noise.alpha_next[-1:] ** 2 + noise.sigma_next[-1:] ** 2
    level = torch.cat([noise.alpha**2 + noise.sigma**2, arrives]).sqrt()
    table = Table(
        spec.column(noise.p),
        spec.column(noise.q),
        noise.clip,
        spec.column(noise.input_scale) if scaled and bool((noise.input_scale != 1).any()) else None,
        momentum,
        spread,
        scan,
        (level[-1] / level).to(spec.device, spec.dtype)[:, None],
        rows,
        by_wave(program, partial(_sweeps, program, everywhere, rows, slides=options.window is not None)),
        options.history,
        options.regularisation,
        MIXINGS,
        step_numbers(scan, momentum, spread),
        look_back,
    )
    return table, spec.column(growth)


def usual_std(noise: NoiseTable) -> float:
    """Standard deviation of Gaussian data that respond about as a network's do: less than that of all data, 1.

    Given the state, and the text or the observation, much less is open.
    """
    return 0.6 if noise.clip is None else 0.3 * range_of(noise.clip)


def data_std_of(noise: NoiseTable, options: Parameters) -> float | None:
    """`Parameters.data_std` as a number."""
    if options.data_std == "auto":
        return 1.0 if noise.clip is None else 0.5 * range_of(noise.clip)
    return options.data_std


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


def look_back_of(noise: NoiseTable, spec: TensorSpec) -> LookBack | None:
    """What steps take of the points before theirs, for states like these; None: nothing, or momentum."""
    triangles = noise.triangles
    if triangles is None:
        return None
    assert noise.memory is not None
    of_z = None
    if triangles.draw_turns:
        of_z = torch.zeros_like(triangles.of_x)
        of_z[:, list(triangles.draw_turns)] = triangles.of_z
    found = LookBack(triangles.of_x.tril(-1), triangles.of_m.tril(-1), of_z, noise.memory.of_given())
    large = max(float(each.abs().max()) for each in found[:2]) > LARGE_WEIGHT
    dtype = torch.float64 if large else spec.dtype
    return LookBack(*(None if each is None else each.to(spec.device, dtype) for each in found))


def propagation(noise: NoiseTable, data_std: float | None) -> Tensor:
    """By how much an error of each step moves the points behind it, [N, N] float64, for Gaussian data.

    With x_{i+1} = sum_j A_ij x_j + B_ij m_j and an output that responds with M to its point, errors obey
    e_i = r_i + sum_{1 <= j <= i} (A_ij + B_ij M_j) e_{j-1}, r the error of each step itself. data_std: as of
    `responses`; None: with the M by which a first-order step passes on an error as it is.
    """
    assert noise.triangles is not None
    response, _ = responses(noise, data_std)
    if data_std is None:
        keep = noise.sigma_next / noise.sigma
        gain = noise.alpha_next - keep * noise.alpha
        response = torch.where(gain.abs() > SMALLEST_GAIN, (1 - keep) / gain, 1.0)
    by_point = noise.triangles.of_x + noise.triangles.of_m * ((response - noise.p) / noise.q)
    passes_on = torch.cat((by_point[:, 1:], torch.zeros_like(by_point[:, :1])), 1)
    identity = torch.eye(noise.num_steps, dtype=torch.float64, device="cpu")
    found: Tensor = torch.linalg.solve_triangular(identity - passes_on, identity, upper=False, unitriangular=True)
    return found


def by_wave(program: Sweeps, make: Callable[[], Iterator[tuple[int, Made]]]) -> Mapping[int, Made] | Sequence[Made]:
    """What each sweep needs, by the number of its last wave; of long programs on demand.

    make: the numbers, and what is needed, in order.
    """
    if not isinstance(program, LongProgram):
        return dict(make())
    return OnDemand(len(program), partial(_by_number, make))


def _by_number(make: Callable[[], Iterator[tuple[int, Made]]]) -> Iterator[Made]:
    """By the number of every wave: the parts of one that was too wide have what the last of them has."""
    begun = 0
    for number, each in make():
        yield from repeat(each, number + 1 - begun)
        begun = number + 1


def _part(everywhere: Tensor, positions: Sequence[int]) -> Tensor:
    """Positions that follow each other, as a tensor. everywhere: all of the grid."""
    return everywhere[positions[0] : positions[-1] + 1]


def _sweeps(
    program: Sweeps, everywhere: Tensor, rows: Sequence[Tensor], *, slides: bool
) -> Iterator[tuple[int, Sweep]]:
    first: int | None = None
    for number, wave in enumerate(program):
        positions = program.positions[number]
        first = positions[0] if first is None else first
        if not (slides or wave.boundaries):  # a part of a wave that was too wide
            continue
        next_positions, rows_of_next = None, None
        if not slides:
            rows_of_next = torch.full((program.num_steps + 1,), -1, dtype=torch.int32, device="cpu")
            if number + 1 < len(program):
                next_positions, following = rows[number + 1], program.positions[number + 1]
                count = torch.arange(len(following), dtype=torch.int32, device="cpu")
                rows_of_next[following[0] : following[-1] + 1] = count
            rows_of_next = rows_of_next.to(everywhere.device)
        at = _part(everywhere, (first, positions[-1]))
        yield number, Sweep(first, positions[-1], at, next_positions, rows_of_next)
        first = None
