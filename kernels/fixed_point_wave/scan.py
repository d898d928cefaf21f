"""The sweep's steps along the grid in plain PyTorch: all points at once, by one triangular matrix product.

The recurrence x_{i+1} = f_i + c_i (x_i - y_i), with x_first = y_first, is the same as

    x_{i+1} = f_i + sum_{j < i} (c_{j+1} ... c_i) (f_j - y_{j+1})

On a CPU the product takes a fraction of the time of one small operation per step. Where the correction of a step
reaches only the next few points, the matrix is a band of the full one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.clamping import Clip, clamped


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
        # [N, N]: how far the residual of step j moves the point after step i > j; the diagonal is zero
        if reach is None:
            reach = torch.zeros(len(steps), len(steps), dtype=torch.float64, device="cpu")
            for i, step in enumerate(steps[1:], start=1):
                reach[i, : i - 1] = step.c * reach[i - 1, : i - 1]
                reach[i, i - 1] = step.c
        self._reach = (reach if order is None else reach.triu(1 - order)).to(device, dtype)

    def points(self, y: Tensor, m: Tensor, first: int, added: Tensor | None = None) -> Tensor:
        """Points 1 .. W of the new iterate, [W, samples, ...]; y: the old one, [W + 1, samples, ...].

        m, added: [W, samples, ...], of y's dtype: the network's output at y's points; noise and momentum.
        """
        last = first + len(m)
        x = self.stepped(y, m, first, added)
        residual = (x - y[1:]).flatten(1)
        # The correction comes last and is zero where the old iterate is a solution, so that the steps are returned to
        # the bit. No correction reaches the first point. It is left out, since 0 times infinity would make it NaN.
        x[1:] += (self._reach[first + 1 : last, first : last - 1] @ residual[:-1]).view_as(x[1:])
        return x

    def stepped(self, y: Tensor, m: Tensor, first: int, added: Tensor | None = None) -> Tensor:
        """The steps from the old iterate, uncorrected, [W, samples, ...], in new memory. Arguments: see `points`."""
        a, b, _, e, p, q = self._columns[:, first : first + len(m)]
        f = a * y[:-1] + b * m
        if self._clip is not None:
            f = f + e * clamped(p * y[:-1] + q * m, self._clip)
        stepped: Tensor = f if added is None else f + added
        return stepped
