"""What the sweeps of a run share, and what each of them goes by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..affine_scan.prepared import PreparedScan

# points of which a local polynomial is made: cubic
LOCAL = 4


class Walk(NamedTuple):
    """What a kernel that goes from point to point does at each, from the first one on.

    Around a point lie LOCAL nodes; from one point to the next, at most one of them is exchanged.

    Attributes:
        rows: [N - first, 3] int32: the row that the point is; the one that comes among those around it, and its
            position. -1 where there is none.
        weights: [N - first, LOCAL], of those around the point, in order.
    """

    rows: Tensor
    weights: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Walk:
        """The same on a device, weights in this dtype."""
        return Walk(self.rows.to(device), self.weights.to(device, dtype))


class Sweep(NamedTuple):
    """The points that were evaluated for a sweep; tensors are on the device.

    Attributes:
        first, last: the first and the last one.
        positions: of all.
        weights: [N - first, nodes], of the nodes in every point from the first on; None: they are all points.
        walk: the same for the kernel.
        to_come: positions of the rows of the wave that comes next; None: no wave does, or the window slides.
        entering: [N + 1] int32, which row of it a point is, -1: none; None: the window slides.
    """

    first: int
    last: int
    positions: Tensor
    weights: Tensor | None
    walk: Walk | None
    to_come: Tensor | None
    entering: Tensor | None


@dataclass(frozen=True, eq=False)
class Table:
    """What is known of a grid. Columns are [N, 1, ...] and broadcast over states [samples, ...]; all on the device, in
    the dtype of the state.

    Attributes:
        p, q: x0 = p x + q m.
        clip: bound of x0, or None.
        response: by how much the network's output at a point moves with the point.
        input_scale: the network sees input_scale * x; None: x itself.
        momentum: of multistep steps, or None.
        spread: of stochastic steps, or None.
        scan: the sweep's steps.
        weight: [N + 1, 1], what a point's movement means for the sample: 1 for the last, less where states are larger.
        rows: of each wave, the positions of its rows.
        sweeps: by the number of its last wave.
        history, regularisation: of the mixing.
        longest: the first sweep that looks back at the newest difference alone.
        numbers: [N, 10], what a kernel reads of each step: the scan's coefficients, response, momentum and spread.
    """

    p: Tensor
    q: Tensor
    clip: float | None
    response: Tensor
    input_scale: Tensor | None
    momentum: Tensor | None
    spread: Tensor | None
    scan: PreparedScan
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
        """The kernels can do it: the correction reaches all the way along."""
        return self.scan.order is None

    def differences(self, sweeps: int) -> int:
        """To how many earlier iterates a sweep mixes its differences, after so many sweeps.

        An old one misleads where a sample has turned since: what has not settled goes by the newest alone.
        """
        return min(sweeps, self.history if sweeps < self.longest else 1, self.history)


def step_numbers(scan: PreparedScan, response: Tensor, momentum: Tensor | None, spread: Tensor | None) -> Tensor:
    """`Table.numbers`."""
    absent = torch.zeros_like(response)
    columns = (response, absent if momentum is None else momentum, absent if spread is None else spread)
    return torch.cat([scan.table, *(column.flatten()[:, None] for column in columns)], 1)


def walk(positions: tuple[int, ...], weights: Tensor) -> Walk:
    """Of nodes at these positions with these weights, [N - first, nodes]; on the CPU."""
    points = torch.arange(len(weights)) + positions[0]
    nodes = torch.tensor(positions)
    # the nodes that have been passed; LOCAL around the point, half of them ahead
    passed = torch.searchsorted(nodes, points, right=True)
    begin = (passed - LOCAL // 2).clamp(0, max(0, len(nodes) - LOCAL))
    around = begin[:, None] + torch.arange(LOCAL)
    inside = around < len(nodes)
    local = weights.gather(1, around.clamp(max=len(nodes) - 1)) * inside
    row = torch.where(nodes[passed - 1] == points, passed - 1, -1)
    comes = torch.where(begin > begin.roll(1), begin + LOCAL - 1, -1)
    comes[0] = -1
    where = torch.where(comes >= 0, nodes[comes], -1)
    return Walk(torch.stack([row, comes, where], 1).int(), local)
