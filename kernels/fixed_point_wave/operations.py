"""The operations of a sweep in plain PyTorch: those of the reference, and of windows that slide."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.clamping import clamped
from .anderson import anderson_mix
from .memory import Memory
from .table import Table


def predict_x0(table: Table, x: Tensor, m: Tensor, first: int, last: int) -> Tensor:
    """x0 at the points from `first` to `last` - 1, from the network's output there."""
    x0 = table.p[first:last] * x[first:last] + table.q[first:last] * m[first:last]
    return clamped(x0, table.clip)


def additions(table: Table, memory: Memory, first: int, last: int) -> Tensor | None:
    """The noise and what the steps from `first` to `last` - 1 take of earlier ones; None if they add neither."""
    if table.look_back is not None:
        return table.look_back.added(memory.x, memory.m, memory.draws, memory.carried, last)[first:]
    added = None
    if table.spread is not None:
        assert memory.draws is not None
        added = table.spread[first:last] * memory.draws[first:last]
    if table.momentum is not None:
        x0 = predict_x0(table, memory.x, memory.m, max(0, first - 1), last)
        if first == 0:
            x0 = torch.cat([x0[:1] if memory.x0_prev is None else memory.x0_prev[None], x0])
        momentum = table.momentum[first:last] * x0.diff(dim=0)
        added = momentum if added is None else added + momentum
    return added


def mixed(table: Table, memory: Memory, points: Tensor, first: int, last: int) -> Tensor:
    """Triangular Anderson acceleration of the points from `first` + 1 to `last`, as the sweep made them."""
    x, window = memory.x, slice(first + 1, last + 1)
    residual = torch.sub(points, x[window], out=memory.residual(0)[window])
    count = table.differences(memory.sweeps)
    if count == 0:
        return points
    dx, dr = points.new_empty(2, count, *points.shape)
    for of, found in ((memory.iterate, dx), (memory.residual, dr)):
        for age, difference, ended in zip(reversed(range(count)), found, memory.lasts[-count:], strict=True):
            torch.sub(of(age)[window], of(age + 1)[window], out=difference)
            if ended < last:  # points that joined the window later have no residual from that sweep
                difference[max(0, ended - first) :] = 0.0
    mixed = anderson_mix(x[window], residual, dx, dr, table.regularisation)
    # The first point is exact if the one before it is. Copy it: x + (f - x) rounds, and is NaN where x is infinite.
    mixed[0] = points[0]
    return mixed
