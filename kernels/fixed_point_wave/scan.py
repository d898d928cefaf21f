"""The sweep's steps along the grid in plain PyTorch: all points at once, by one triangular matrix product.

The recurrence x_{i+1} = f_i + c_i (x_i - y_i), with x_first = y_first, is the same as

    x_{i+1} = f_i + sum_{j < i} (c_{j+1} ... c_i) (f_j - y_{j+1})

On a CPU the product takes a fraction of the time of one small operation per step. Where the correction of a step
reaches only the next few points, the matrix is a band of the full one.

A matrix of thousands of steps would take gigabytes. Such a grid is cut into blocks: what the points before a block have
moved in all is, to it, the residual of the step that leads to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.clamping import Clip, clamped

# steps of a block, and how far apart blocks begin, so that every window of HALF steps lies within one
BLOCK, HALF = 512, 256


class ScanStep(NamedTuple):
    """Coefficients of one step: x' = a y + b m + e clamp(p y + q m, -clip, clip) + c (x - y).

    y is the old state at the point, x the new one, m the network's output there. c = 1 is Picard iteration (ParaDiGMS,
    Shih et al. 2023, algorithm 1); c = a carries the linear part of the step exactly (ParaTAA, Tang et al. 2024).
    """

    a: float
    b: float
    c: float
    e: float = 0.0
    p: float = 0.0
    q: float = 0.0


class Scan:
    """The steps of a grid, applied to a window of it; dtype, device and ndim are those of a state [samples, ...].

    clip: bound of the clamp; None leaves the term out. order: how many points the correction of a step reaches, at
    least 1; None: all. reach: [N, N], how far the residual of each step moves the later points, where that does not
    follow from c alone. The kernels support None only, of both.
    """

    def __init__(
        self,
        steps: Sequence[ScanStep],
        dtype: torch.dtype,
        device: torch.device,
        ndim: int,
        clip: Clip | None = None,
        order: int | None = None,
        reach: Tensor | None = None,
    ) -> None:
        # [N, 6], rounded once from float64
        self.table = torch.tensor(steps, dtype=torch.float64, device="cpu").to(device, dtype)
        self._columns = self.table.T.reshape(len(ScanStep._fields), len(steps), *[1] * ndim)
        self.order, self._clip = order, clip
        # [blocks, steps, steps]: how far, within a block, the residual of step j moves the point after step i > j; the
        # diagonal is zero. One block with all steps, where it is given or a band, which has no sum to carry on.
        whole = reach is not None or order is not None or len(steps) <= BLOCK
        if reach is None:
            reach = _reach([step.c for step in steps], len(steps) if whole else BLOCK, len(steps) if whole else HALF)
        self._reach = (reach if order is None else reach.triu(1 - order)).to(device, dtype).view(-1, *reach.shape[-2:])
        self._apart = len(steps) if whole else HALF

    def points(self, y: Tensor, m: Tensor, first: int, added: Tensor | None = None) -> Tensor:
        """Points 1 .. W of the new iterate, [W, samples, ...]; y: the old one, [W + 1, samples, ...].

        m, added: [W, samples, ...], of y's dtype: the network's output at y's points; noise and momentum.
        """
        return self.corrected(self.stepped(y, m, first, added), y, first)

    def corrected(self, x: Tensor, y: Tensor, first: int) -> Tensor:
        """The same from what `stepped` gives, x, which is written to."""
        last = first + len(x)
        residual = (x - y[1:]).flatten(1)
        # The correction comes last and is zero where the old iterate is a solution, so that the steps are returned to
        # the bit. No correction reaches the first point. It is left out, since 0 times infinity would make it NaN.
        at = first
        while True:
            block, size = min(at // self._apart, len(self._reach) - 1), self._reach.shape[-1]
            begin = block * self._apart
            stop = min(last, begin + size)
            reach = self._reach[block, at + 1 - begin : stop - begin, at - begin : stop - 1 - begin]
            points = x[at + 1 - first : stop - first]
            points += (reach @ residual[at - first : stop - 1 - first]).view_as(points)
            if stop == last:
                return x
            at = stop - 1
            residual[at - first] = (x[at - first] - y[at - first + 1]).flatten()

    def stepped(self, y: Tensor, m: Tensor, first: int, added: Tensor | None = None) -> Tensor:
        """The steps from the old iterate, uncorrected, [W, samples, ...], in new memory. Arguments: see `points`."""
        a, b, _, e, p, q = self._columns[:, first : first + len(m)].unbind()
        x = y[:-1]
        f = a * x + b * m
        if self._clip is not None:
            f = f + e * clamped(p * x + q * m, self._clip)
        stepped: Tensor = f if added is None else f + added
        return stepped


def _reach(c: Sequence[float], size: int, apart: int) -> Tensor:
    """[blocks, size, size] float64, of blocks of `size` steps that begin `apart` steps from each other."""
    count = -(-max(len(c) - size, 0) // apart) + 1
    padded = torch.zeros((count - 1) * apart + size, dtype=torch.float64, device="cpu")
    padded[: len(c)] = torch.tensor(c, dtype=torch.float64, device="cpu")
    columns = padded.unfold(0, size, apart)
    found = torch.zeros(count, size, size, dtype=torch.float64, device="cpu")
    for i in range(1, size):
        found[:, i, : i - 1] = columns[:, i, None] * found[:, i - 1, : i - 1]
        found[:, i, i - 1] = columns[:, i]
    return found
