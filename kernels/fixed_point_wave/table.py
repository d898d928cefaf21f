"""The constants of a run: coefficients of the grid's steps, and the rows of each sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.clamping import Clip, Threshold
from ..common.look_back import LookBack
from .scan import Scan


class Sweep(NamedTuple):
    """The rows of one sweep; tensors are on the device."""

    first: int  # position of the first row
    last: int  # position of the last row
    positions: Tensor  # of all rows: every point from the first to the last
    next_positions: Tensor | None  # of the rows of the next wave; None: there is none, or the window slides
    next_rows: Tensor | None  # [N + 1] int32, each point's row in the next wave, -1 for none; None: the window slides


@dataclass(frozen=True, eq=False)
class Table:
    """The constants of a grid, on the device, in the state's dtype. Columns, [N, 1, ...], broadcast over states."""

    p: Tensor  # x0 = p x + q m, which clip bounds if that is not None
    q: Tensor
    clip: Clip | None
    input_scale: Tensor | None  # the network's input is input_scale * x; None: it is x
    momentum: Tensor | None  # of multistep steps, as in `NoiseTable`
    spread: Tensor | None  # of stochastic steps, as in `NoiseTable`
    scan: Scan  # the steps of the sweep
    # [N + 1, 1], how much a point's movement counts in `SweepResult.change`: 1 for the last point, less for points
    # whose states have a larger standard deviation
    weight: Tensor
    rows: Sequence[Tensor]  # for each wave, the positions of its rows
    sweeps: Mapping[int, Sweep] | Sequence[Sweep]  # by the number of the sweep's last wave
    history: int  # the most differences that are mixed, H
    regularisation: float  # of the mixing, lambda
    longest: int  # the first sweep that mixes the newest difference only
    numbers: Tensor  # [N, 8], what the kernel reads for each step: the scan's coefficients, momentum, spread
    look_back: LookBack | None = None  # what steps take of the points before theirs; None: nothing, or momentum

    @property
    def num_steps(self) -> int:
        return len(self.p)

    @property
    def fused(self) -> bool:
        """Whether the kernels can run these sweeps: a correction reaches all later points, a step looks at one x0.

        Nor is that x0 thresholded, which takes all elements of a sample.
        """
        return self.scan.order is None and self.look_back is None and not isinstance(self.clip, Threshold)

    def differences(self, sweeps: int) -> int:
        """How many differences the next sweep mixes, after so many sweeps."""
        # Old differences mislead where a sample has changed direction since, so late sweeps use the newest one only.
        return min(sweeps, self.history if sweeps < self.longest else 1, self.history)


def step_numbers(scan: Scan, momentum: Tensor | None, spread: Tensor | None) -> Tensor:
    """`Table.numbers`."""
    columns = [scan.table.new_zeros(len(scan.table)) if each is None else each for each in (momentum, spread)]
    return torch.cat([scan.table, *(column.flatten()[:, None] for column in columns)], 1)
