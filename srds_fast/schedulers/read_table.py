"""The noise table of a scheduler of any class, made from the numbers that its own step and its own `add_noise` give.

`read` gives the steps as triangles. The columns of a table say them if turn i needs, of what came before it, x_i and
one more vector that is linear in x_{i-1} and m_{i-1}: the x0 of the step before. This covers first-order schedulers,
multistep ones of order 2, and those with two network calls a step (Heun, KDPM2, DPM-Solver singlestep), whose second
call is a turn of its own: what they keep of the first one is x0 and x_i in other words. The tables of all others have
the triangles themselves, see `memory_table`.

The levels (alpha, sigma) at which the network is called come from adding noise to unit vectors. The x0 that the network
predicts is, in this order: what the step reports; the parametrization that agrees best with the steps; what the steps
themselves imply, as a step from level to level leaves a constant x0 on the line x = alpha * x0 + sigma * eps. The steps
of a table are exact with any x0; jumps and guesses of the parallel methods are as good as x0 is.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedScheduler
from .levels import FAR, SAME_X0, levels_of, parametrizations
from .memory_table import table_with_memory
from .own_loop import OwnLoop, StepCall
from .private_draws import Seeded
from .reader import InFloat64, Triangles, draw_dtypes, read
from .refusal import refused
from .step_noise import StepNoise
from .table import NoiseTable

# relative size of a number that is rounding
ROUNDING = 1e-12
# an x0 that every step clips that clips at all
FAR_BEYOND = 2.0**12


def table_by_reading(scheduler: Any, call: StepCall) -> NoiseTable:
    """The table of a scheduler whose `set_timesteps` has run; of one that clips x0, the bound is read, too.

    Raises UnsupportedScheduler, with the reason, if its step is not linear or if a table cannot say it.
    """
    clips = None
    try:
        as_read = read(scheduler, call)
    except UnsupportedScheduler as not_linear:
        try:
            as_read, clips = read(scheduler, call, near_zero=True), not_linear
        except UnsupportedScheduler:
            raise not_linear from None
    triangles = as_read.with_one_draw()
    levels = levels_of(scheduler, triangles)
    turns = _local_turns(triangles)
    steps = None if turns is None else _with_x0(turns, levels, triangles)
    if turns is None or steps is None:
        if clips is not None:
            raise refused(scheduler, "its step clips x0, and needs more of earlier steps than one x0") from clips
        return table_with_memory(scheduler, call, levels)
    alpha, sigma = levels.T
    p, q, a, b, momentum, recovered = (
        torch.tensor(column, dtype=torch.float64, device="cpu") for column in zip(*steps, strict=True)
    )
    r, s = (1 - alpha * p) / sigma, -alpha * q / sigma
    # a * x + b * m as a sum of x0 and eps
    of_x0, of_eps = alpha * a + (1 - alpha * p) * b / q, sigma * (a - b * p / q)
    of_eps = torch.where(of_eps.abs() < ROUNDING * sigma, 0.0, of_eps)  # a step that ends at x0 ends there exactly
    draws = torch.zeros(len(turns), dtype=torch.bool, device="cpu")
    draws[list(triangles.draw_turns)] = True
    spread = torch.tensor([turn.spread for turn in turns], dtype=torch.float64, device="cpu")
    table = NoiseTable(
        scheduler.timesteps.cpu()[: triangles.turns],
        alpha,
        sigma,
        of_x0 - momentum,
        of_eps,
        p,
        q,
        r,
        s,
        input_scale=triangles.input_scale,
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        momentum=momentum if bool(momentum.any()) else None,
        recovered=recovered if bool(recovered.any()) else None,
        spread=spread if bool(spread.any()) else None,
        draws=draws if bool(draws.any()) else None,
        draw_dtypes=draw_dtypes(scheduler, call, triangles.turns) if bool(draws.any()) else {},
        step_noise=StepNoise.where_needed(scheduler, call, as_read),
    )
    return table if clips is None else replace(table, clip=_bound(scheduler, call, table, clips))


def _bound(scheduler: Any, call: StepCall, table: NoiseTable, not_linear: UnsupportedScheduler) -> float:
    """The bound of x0, from what the first step makes of zero noise and of an x0 far beyond any bound.

    Raises `not_linear` if its size does not look like one; the check of the table tells whether it is.
    """
    column, found = {name: values[0] for name, values in table.numbers.items()}, list[float]()
    for x0 in (0.0, FAR_BEYOND, 2 * FAR_BEYOND):
        m = torch.full((1, 1, 1, 1), x0 / column["q"], dtype=torch.float64, device="cpu")
        loop = OwnLoop(scheduler, call, generator=torch.Generator().manual_seed(0))
        with Seeded(), InFloat64(tuple(m.shape)):
            x = torch.zeros_like(m)
            loop.scaled(x)
            found.append(float(loop.step(m, x)))
    of_nothing, once, twice = found
    # as in the step of a table: eps is that of the output, or made again from the clipped x0
    of_output = column["sigma_next"] * column["s"] * FAR_BEYOND / column["q"]
    by_x0, beside = column["alpha_next"], of_output
    if abs(twice - once) < abs(of_output) / 2:
        by_x0, beside = by_x0 - column["sigma_next"] * column["alpha"] / column["sigma"], 0.0
    bound = (once - of_nothing - beside) / by_x0 if by_x0 else math.nan
    if not 0 < bound < FAR_BEYOND / 2:
        raise not_linear
    return float(f"{bound:.6g}")


class _Turn(NamedTuple):
    """x_{i+1} = a * x_i + b * m_i + e * x_{i-1} + f * m_{i-1} + spread * z_i."""

    a: float
    b: float
    e: float
    f: float
    spread: float

    @property
    def first_order(self) -> bool:
        return self.e == 0 and self.f == 0


class _Step(NamedTuple):
    """x0_i = p * x_i + q * m_i, and x_{i+1} = a * x_i + b * m_i - momentum * x0_{i-1} + spread * z_i."""

    p: float
    q: float
    a: float
    b: float
    momentum: float
    recovered: float = 0.0  # the part of a that stands for x_{i-1}; see `NoiseTable`


def _local_turns(triangles: Triangles) -> list[_Turn] | None:
    """The turns, if each looks back one turn at most and uses no noise but its own; else None."""
    far = max(float(each.tril(-2).abs().max()) for each in (triangles.of_x, triangles.of_m))
    if far > ROUNDING * float(triangles.of_x.abs().max()):
        return None
    spread = torch.zeros(triangles.turns, dtype=torch.float64, device="cpu")
    for number, turn in enumerate(triangles.draw_turns):
        if bool(triangles.of_z[turn + 1 :, number].any()):
            return None
        spread[turn] = triangles.of_z[turn, number]
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    columns = (
        triangles.of_x.diag(),
        triangles.of_m.diag(),
        torch.cat((zero, triangles.of_x.diag(-1))),
        torch.cat((zero, triangles.of_m.diag(-1))),
        spread,
    )
    return [_Turn(*row) for row in torch.stack(columns, 1).tolist()]


def _with_x0(turns: list[_Turn], levels: Tensor, triangles: Triangles) -> list[_Step] | None:
    """The steps with the first description of x0 that goes with them; None if they keep something else than x0."""
    reported = torch.stack((triangles.x0_of_x, triangles.x0_of_m), 1)
    if bool(reported.isfinite().all()) and bool((reported[:, 1] != 0).all()):
        steps = _steps(turns, levels, reported)
        if steps is not None:
            return steps
    implied = _steps(turns, levels, None)
    assert implied is not None
    fits = []
    ends = torch.cat((levels[1:, 0], levels.new_ones(1)))
    arrives = torch.tensor([[turn.a, turn.b] for turn in turns], dtype=torch.float64, device="cpu") / ends[:, None]
    for x0 in (*parametrizations(levels), arrives):  # steps of consistency models arrive at x0, but for noise
        steps = _steps(turns, levels, x0)
        if steps is not None:
            fits.append((_distance(steps, implied, levels), steps))
    if all(math.isfinite(number) for step in implied for number in step):
        fits.append((SAME_X0, implied))
    distance, steps = min(fits, key=lambda fit: fit[0], default=(math.inf, None))
    return None if distance > FAR else steps


def _distance(steps: list[_Step], implied: list[_Step], levels: Tensor) -> float:
    """Median relative difference of x0 to the one that the steps imply, infinite if they imply none."""
    sizes = levels.norm(dim=1).tolist()
    differences = [
        math.hypot((step.p - other.p) * size, step.q - other.q) / math.hypot(other.p * size, other.q)
        for step, other, size in zip(steps, implied, sizes, strict=True)
        if math.isfinite(other.p)
    ]
    return sorted(differences)[len(differences) // 2] if differences else math.inf


def _steps(turns: list[_Turn], levels: Tensor, x0: Tensor | None) -> list[_Step] | None:
    """The turns as steps with this x0 [T, 2], or with the x0 that they imply, NaN where that is not known.

    Returns None if a given x0 is not what the turns keep.
    """
    numbers: list[list[float]] = levels.tolist()
    given: list[list[float]] | None = None if x0 is None else x0.tolist()
    if given is not None and not all(math.isfinite(p) and math.isfinite(q) and q != 0 for p, q in given):
        return None
    steps: list[_Step] = []
    for index, turn in enumerate(turns):
        a, momentum, recovered = turn.a, 0.0, 0.0
        if not turn.first_order:
            looked = _look_back(turn, turns[index - 1], steps[-1], math.hypot(*numbers[index - 1]))
            if looked is None and given is not None:
                return None
            a, momentum, steps[-1], recovered = looked or (math.nan, math.nan, steps[-1], 0.0)
        p, q = given[index] if given is not None else _implied(a, turn, momentum, numbers[index : index + 2])
        steps.append(_Step(p, q, a, turn.b, momentum, recovered))
    return steps


def _look_back(turn: _Turn, last: _Turn, before: _Step, size: float) -> tuple[float, float, _Step, float] | None:
    """Of a turn that looks back: a, momentum, the step before it with exactly the x0 that the turn keeps, recovered."""
    momentum = -turn.f / before.q
    if momentum and abs(-turn.e / momentum - before.p) * size <= SAME_X0 * max(1.0, abs(before.p) * size):
        return turn.a, momentum, before._replace(p=-turn.e / momentum), 0.0
    # x_{i-1} and m_{i-1} are x_i and x0_{i-1} in other words, if nothing else is in x_i
    determinant = last.a * before.q - last.b * before.p
    if not last.first_order or last.spread != 0 or not determinant:
        return None
    of_x = (turn.e * before.q - turn.f * before.p) / determinant
    return turn.a + of_x, (last.b * turn.e - last.a * turn.f) / determinant, before, of_x


def _implied(a: float, turn: _Turn, momentum: float, levels: list[list[float]]) -> tuple[float, float]:
    """x0 of a turn that leaves a constant x0 where the next level has it. levels: here and next; the last one is x0."""
    (alpha, sigma), (alpha_next, sigma_next) = levels if len(levels) == 2 else (levels[0], (1.0, 0.0))
    keep = math.sqrt(max(0.0, sigma_next**2 - turn.spread**2)) / sigma if sigma else math.nan
    gain = alpha_next - keep * alpha + momentum
    return ((a - keep) / gain, turn.b / gain) if gain and turn.b else (math.nan, math.nan)
