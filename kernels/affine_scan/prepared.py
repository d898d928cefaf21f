"""A scan that is done again and again with the same steps: the kernel on CUDA, one triangular product elsewhere.

    x_{i+1} = f_i + sum_{j < i} (c_{j+1} ... c_i) (f_j - y_{j+1})

is the same recurrence with its sum written out. On a CPU the product takes a fraction of the time that as many small
operations as there are steps take. A correction that reaches along a few steps only is a band of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import implementation
from . import Coefficients, affine_scan, coefficient_table


class PreparedScan:
    """See `affine_scan`.

    Args:
        steps: of the whole grid.
        dtype, device: of the states; ndim: of a state [samples, ...].
        clip: bound of the clamp; None leaves the term out.
        order: steps that the correction reaches along, at least 1; None: all.

    Attributes:
        table: of the steps, see `coefficient_table`.
        order: as given; the kernel has none.
    """

    def __init__(
        self,
        steps: Sequence[Coefficients],
        dtype: torch.dtype,
        device: torch.device,
        ndim: int,
        clip: float | None = None,
        order: int | None = None,
    ) -> None:
        self.table = coefficient_table(steps, dtype, device)
        self._columns = self.table.T.reshape(len(Coefficients._fields), len(steps), *[1] * ndim)
        self.order = order
        self._clip = clip
        self._by_kernel = order is None and implementation(device) != "torch"
        self._reach = None if self._by_kernel else _reach(steps, order).to(device, dtype)

    def __call__(self, y: Tensor, m: Tensor, first: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scan the steps from `first` on, as many as m has.

        Args:
            y: [W + 1, samples, ...], the old iterate; where it begins, the new one does.
            m: [W, samples, ...], of y's dtype.
            noise: [W, samples, ...].

        Returns:
            points 1..W of the new iterate, [W, samples, ...]; [W, samples], the sum over elements of their squared
            differences to the old ones.
        """
        if self._by_kernel:
            return affine_scan(y, m, self.table[first : first + len(m)], noise=noise, clip=self._clip)
        x = self.points(y, m, first, noise)
        return x, (x - y[1:]).square().flatten(2).sum(2)

    def points(self, y: Tensor, m: Tensor, first: int, noise: Tensor | None = None) -> Tensor:
        """The points alone."""
        if self._by_kernel:
            return self(y, m, first, noise)[0]
        assert self._reach is not None
        last = first + len(m)
        x = self.stepped(y, m, first, noise)
        residual = (x - y[1:]).flatten(1)
        # added last, and zero where the old iterate is a solution: the steps are then returned as they are. The first
        # one is left out, as no correction reaches it: zero times what is not finite would
        x[1:] += (self._reach[first + 1 : last, first : last - 1] @ residual[:-1]).view_as(x[1:])
        return x

    def outputs(self, y: Tensor, noise: Tensor | None = None) -> Tensor | None:
        """The network's outputs with which the steps lead from each point of the grid to the next, [N, samples, ...].

        Args:
            y: [N + 1, samples, ...].
            noise: [N, samples, ...].

        Returns:
            None where the steps clamp: many outputs lead there.
        """
        if self._clip is not None:
            return None
        a, b, _, s, *_ = self._columns
        led = y[1:] - a * y[:-1]
        outputs: Tensor = (led if noise is None else led - s * noise) / b
        return outputs

    def stepped(self, y: Tensor, m: Tensor, first: int, noise: Tensor | None = None) -> Tensor:
        """What the steps make of the old iterate, [W, samples, ...], fresh memory; arguments as of a scan."""
        a, b, _, s, e, p, q = self._columns[:, first : first + len(m)]
        f = a * y[:-1] + b * m
        if self._clip is not None:
            f = f + e * torch.clamp(p * y[:-1] + q * m, -self._clip, self._clip)
        stepped: Tensor = f if noise is None else f + s * noise
        return stepped


def _reach(steps: Sequence[Coefficients], order: int | None) -> Tensor:
    """[N, N] float64: how far the residual of step j moves the point after step i > j; nothing on the diagonal."""
    reach = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    for i, step in enumerate(steps):
        if i > 0:
            reach[i, : i - 1] = step.c * reach[i - 1, : i - 1]
            reach[i, i - 1] = step.c
    return reach if order is None else reach.triu(1 - order)
