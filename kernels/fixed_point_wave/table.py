"""The constants of a run: coefficients of the grid's steps, and the rows of each sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .scan import Scan

# nodes that a local polynomial goes through: it is cubic. A sweep that interpolates has more nodes than these.
LOCAL = 4


class Walk(NamedTuple):
    """The interpolation weights of the LOCAL nodes around each point, in the order in which the sweep kernel goes.

    From one point to the next, at most one of these nodes is replaced.

    Attributes:
        rows: [N - first, 3] int32. For each point: its row, if it is a node; the node that joins those around it; and
            the position of that node. -1 where there is none.
        weights: [N - first, LOCAL], of the nodes around the point, in order.
    """

    rows: Tensor
    weights: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Walk:
        return Walk(self.rows.to(device), self.weights.to(device, dtype))


class Sweep(NamedTuple):
    """The rows of one sweep; tensors are on the device.

    Attributes:
        first, last: positions of the first and of the last row.
        positions: of all rows.
        weights: [N - first, nodes], of each node in each point from `first` on; None: every point is a row.
        walk: the same weights for the kernel.
        next_positions: positions of the rows of the next wave; None: there is none, or the window slides.
        next_rows: [N + 1] int32, the row of the next wave that each point is, -1 for none; None: the window slides.
    """

    first: int
    last: int
    positions: Tensor
    weights: Tensor | None
    walk: Walk | None
    next_positions: Tensor | None
    next_rows: Tensor | None


@dataclass(frozen=True, eq=False)
class Table:
    """The constants of a grid, on the device, in the dtype of the state. Columns, [N, 1, ...], broadcast over states.

    Attributes:
        p, q, clip: x0 = p x + q m, between -clip and clip if that is not None.
        response: derivative of the network's output at a point with respect to the point.
        input_scale: the network's input is input_scale * x; None: it is x.
        momentum, spread: of multistep and stochastic steps, as in `NoiseTable`; None: they have none.
        scan: the steps of the sweep.
        weight: [N + 1, 1], how much a point's movement counts in `SweepResult.change`: 1 for the last point, less for
            points whose states have a larger standard deviation.
        rows: for each wave, the positions of its rows.
        sweeps: by the number of the sweep's last wave.
        history: the most differences that are mixed, H.
        regularisation: of the mixing, lambda.
        longest: the first sweep that mixes the newest difference only.
        numbers: [N, 9], what the kernel reads for each step: the scan's coefficients, response, momentum and spread.
    """

    p: Tensor
    q: Tensor
    clip: float | None
    response: Tensor
    input_scale: Tensor | None
    momentum: Tensor | None
    spread: Tensor | None
    scan: Scan
    weight: Tensor
    rows: tuple[Tensor, ...]
    sweeps: Mapping[int, Sweep]
    history: int
    regularisation: float
    longest: int
    numbers: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.p)

    @property
    def fused(self) -> bool:
        """Whether the kernels can run these sweeps: they need a correction that reaches all later points."""
        return self.scan.order is None

    def differences(self, sweeps: int) -> int:
        """How many differences the next sweep mixes, after so many sweeps.

        Old differences mislead where a sample has changed direction since, so late sweeps use the newest one only.
        """
        return min(sweeps, self.history if sweeps < self.longest else 1, self.history)


def step_numbers(scan: Scan, response: Tensor, momentum: Tensor | None, spread: Tensor | None) -> Tensor:
    """`Table.numbers`."""
    columns = [torch.zeros_like(response) if each is None else each for each in (response, momentum, spread)]
    return torch.cat([scan.table, *(column.flatten()[:, None] for column in columns)], 1)


def walk(positions: tuple[int, ...], weights: Tensor) -> Walk:
    """The walk of a sweep, on the CPU; positions: of the nodes; weights: see `Sweep`."""
    points = torch.arange(len(weights)) + positions[0]
    nodes = torch.tensor(positions)
    # LOCAL nodes around each point, half of them behind it
    passed = torch.searchsorted(nodes, points, right=True)
    begin = (passed - LOCAL // 2).clamp(0, len(nodes) - LOCAL)
    local = weights.gather(1, begin[:, None] + torch.arange(LOCAL))
    row = torch.where(nodes[passed - 1] == points, passed - 1, -1)
    joins = torch.where(begin.diff(prepend=begin[:1]) > 0, begin + LOCAL - 1, -1)
    where = torch.where(joins >= 0, nodes[joins], -1)
    return Walk(torch.stack([row, joins, where], 1).int(), local)
