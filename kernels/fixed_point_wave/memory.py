"""What a run keeps from sweep to sweep."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..tickets import Tickets
from .table import Table


class Refined(NamedTuple):
    """What a sweep has come to.

    Attributes:
        sample: [samples, ...], the last point.
        change: [samples], mean |x - x before| of the point that moved most, in units of its standard deviation.
        still: [samples] bool, nothing moved by a bit, and nothing was interpolated; None where nobody asked.
        entering: the network's input at the next wave, [branches * rows, samples, ...]; None if no wave comes next.
    """

    sample: Tensor
    change: Tensor
    still: Tensor | None
    entering: Tensor | None


class Memory:
    """The points, what the network said of them, and what the sweeps before made of them. Of one run only.

    Iterates lie in a ring, so that no sweep allocates or copies what it leaves to later ones.

    Args:
        table: of the grid.
        x: starting noise, [samples, ...]; its dtype is the dtype of the state.
        draws: [N, samples, ...], fresh noise of stochastic steps.
        x0_prev: [samples, ...], what a multistep scheduler remembers at the start.

    Attributes:
        m: [N, samples, ...], the network's output at the points; zero at first.
        draws, x0_prev: as given.
        lasts: the step that each sweep so far has ended with.
        tickets: of the kernels.
    """

    def __init__(self, table: Table, x: Tensor, draws: Tensor | None = None, x0_prev: Tensor | None = None) -> None:
        points, self.history = (table.num_steps + 1, *x.shape), table.history
        # beside those that differences are taken of, the one that is being made
        self.iterates = x.new_empty(max(self.history, 1) + 2, *points)
        self.residuals = x.new_empty(self.history + 1 if self.history else 0, *points)
        self.m = x.new_zeros(table.num_steps, *x.shape)
        self.draws = None if draws is None else draws.contiguous()
        self.x0_prev = None if x0_prev is None else x0_prev.contiguous()
        self.lasts: list[int] = []
        self._look_at_rings()
        self.tickets = Tickets(x.device, len(x))
        self.before.zero_()

    def iterate(self, age: int) -> Tensor:
        """[N + 1, samples, ...]; age 0 is the newest, 1 the one that it was made of, -1 is being made."""
        return self._iterates[(self.sweeps - age) % len(self._iterates)]

    def residual(self, age: int) -> Tensor:
        """What a sweep moved the points by before they were mixed, [N + 1, samples, ...]; age 0: the one going on."""
        return self._residuals[(self.sweeps - age) % len(self._residuals)]

    @property
    def x(self) -> Tensor:
        """The newest points."""
        return self.iterate(0)

    @property
    def before(self) -> Tensor:
        """The points that `m` belongs to, but while a sweep goes on."""
        return self.iterate(1)

    @property
    def after(self) -> Tensor:
        """The points that are being made."""
        return self.iterate(-1)

    @property
    def sweeps(self) -> int:
        """So many have been done."""
        return len(self.lasts)

    def advance(self, last: int) -> None:
        """A sweep that ended with this step is done: what was being made is the newest."""
        self.lasts.append(last)

    def keep(self, index: Tensor) -> None:
        """Go on with these positions of the samples only."""
        self.iterates, self.residuals = self.iterates.index_select(2, index), self.residuals.index_select(2, index)
        self._look_at_rings()
        self.m = self.m.index_select(1, index)
        self.draws = None if self.draws is None else self.draws.index_select(1, index)
        self.x0_prev = None if self.x0_prev is None else self.x0_prev.index_select(0, index)

    def _look_at_rings(self) -> None:
        self._iterates, self._residuals = self.iterates.unbind(), self.residuals.unbind()
