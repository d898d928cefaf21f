"""A wave in plain PyTorch, operation by operation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..anderson_mix import anderson_mix
from ..wave_update.buffers import NetworkInput
from .memory import Memory, Refined
from .table import Sweep, Table


def sweep(table: Table, wave: Sweep, memory: Memory, m: Tensor, guidance: Tensor | None) -> None:
    """Learn from the network's output and move the points behind the first row, into `memory.after`."""
    learn(table, wave, memory, guided(m, guidance, memory.m.dtype))
    first = wave.first
    added = additions(table, memory, first, table.num_steps)
    points = table.scan.points(memory.x[first:], memory.m[first:], first, added)
    torch.cat([memory.x[: first + 1], points], out=memory.after)


def mix(table: Table, wave: Sweep, memory: Memory, network: NetworkInput, watch: bool) -> Refined:
    """Mix the points that a sweep has left in `memory.after`, which is then the newest iterate."""
    first, x, after = wave.first, memory.x, memory.after
    if table.history:
        after[first + 1 :] = mixed(table, memory, after[first + 1 :], first, table.num_steps)
    moved = after - x
    still = None
    if watch:
        still = (moved == 0).flatten(2).all(2).all(0)
        if wave.weights is not None:
            still = torch.zeros_like(still)
    change = (table.weight * moved.abs().flatten(2).mean(2)).amax(0)
    memory.advance(table.num_steps)
    given = None if wave.to_come is None else network_input(table, wave.to_come, memory.x, network)
    return Refined(after[-1].clone(), change, still, given)


def guided(m: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The branches of the network's output in one, in the dtype of the state."""
    m = m.to(dtype)
    if guidance is None:
        return m
    branches = m.unflatten(0, (len(guidance), -1))
    m = guidance[0] * branches[0]
    for weight, branch in zip(guidance[1:], branches[1:], strict=True):
        m = m + weight * branch
    return m


def network_input(table: Table, positions: Tensor, x: Tensor, network: NetworkInput) -> Tensor:
    """The network's input at the points at these positions, [branches * rows, samples, ...]."""
    rows = x.index_select(0, positions)
    if table.input_scale is not None:
        rows = rows * table.input_scale.index_select(0, positions)
    given = network.empty(len(positions), x[0])
    given.unflatten(0, (network.branches, -1)).copy_(rows[None])
    return given


def learn(table: Table, wave: Sweep, memory: Memory, got: Tensor) -> None:
    """The network's output at the newest points, at the rows and between them."""
    if wave.weights is None:
        memory.m[wave.first : wave.last + 1] = got
        return
    expected = memory.m + table.response * (memory.x[:-1] - memory.before[:-1])
    surprise = (got - expected.index_select(0, wave.positions)).flatten(1)
    learnt = (wave.weights @ surprise).view_as(expected[wave.first :])
    torch.cat([expected[: wave.first], expected[wave.first :] + learnt], out=memory.m)
    memory.m.index_copy_(0, wave.positions, got)


def predicted(table: Table, x: Tensor, m: Tensor, first: int, last: int) -> Tensor:
    """x0 at the points from `first` to before `last`, by the network's output there."""
    x0 = table.p[first:last] * x[first:last] + table.q[first:last] * m[first:last]
    return x0 if table.clip is None else x0.clamp(-table.clip, table.clip)


def additions(table: Table, memory: Memory, first: int, last: int) -> Tensor | None:
    """What steps add beside what they make of x and x0: fresh noise, and momentum."""
    added = None
    if table.spread is not None:
        assert memory.draws is not None
        added = table.spread[first:last] * memory.draws[first:last]
    if table.momentum is not None:
        x0 = predicted(table, memory.x, memory.m, max(0, first - 1), last)
        if first == 0:
            x0 = torch.cat([x0[:1] if memory.x0_prev is None else memory.x0_prev[None], x0])
        momentum = table.momentum[first:last] * x0.diff(dim=0)
        added = momentum if added is None else added + momentum
    return added


def mixed(table: Table, memory: Memory, points: Tensor, first: int, last: int) -> Tensor:
    """What triangular Anderson acceleration makes of the points of this sweep and those before.

    Args:
        points: [last - first, samples, ...], as the sweep left those behind `first` up to `last`.
    """
    x, window = memory.x, slice(first + 1, last + 1)
    residual = torch.sub(points, x[window], out=memory.residual(0)[window])
    count = table.differences(memory.sweeps)
    if count == 0:
        return points

    def differences(of: Callable[[int], Tensor]) -> Tensor:
        found = points.new_empty(count, *points.shape)
        for age, difference, ended in zip(reversed(range(count)), found.unbind(), memory.lasts[-count:], strict=True):
            torch.sub(of(age)[window], of(age + 1)[window], out=difference)
            if ended < last:  # points that have entered the window since have no residual before
                difference[max(0, ended - first) :] = 0.0
        return found

    dx, dr = differences(memory.iterate), differences(memory.residual)
    mixed: Tensor = anderson_mix(x[window], residual, dx, dr, regularisation=table.regularisation)
    # exact if the one before is, to the bit: x + (f - x) would round, and give back nothing where x is not finite
    mixed[0] = points[0]
    return mixed
