"""What a run keeps from sweep to sweep."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .table import Table


class SweepResult(NamedTuple):
    sample: Tensor  # [samples, ...], the last point
    change: Tensor  # [samples], mean |x - x before| of the point that moved most, in units of its standard deviation
    stationary: Tensor | None  # [samples] bool, no bit changed; None unless asked for
    next_input: Tensor | None  # of the network at the next wave, [branches * rows, samples, ...]; None: there is none


class Memory:
    """The points of one run, the network's outputs at them, and the iterates of earlier sweeps.

    Iterates and residuals lie in rings: a sweep neither allocates nor copies what later sweeps read.
    x: starting noise, [samples, ...]; draws: [N, samples, ...], fresh noise of stochastic steps; carried:
    [vectors, samples, ...], what multistep schedulers have carried to it, with momentum the x0 before the first one.
    """

    def __init__(self, table: Table, x: Tensor, draws: Tensor | None = None, carried: Tensor | None = None) -> None:
        points, history = (table.num_steps + 1, *x.shape), table.history
        # one iterate for each difference, the newest, and the one that is being written
        self.iterates = x.new_empty(max(history, 1) + 2, *points)
        self.residuals = x.new_empty(history + 1 if history else 0, *points)
        # the network's output at the points
        self.m = x.new_zeros(table.num_steps, *x.shape)
        self.draws = None if draws is None else draws.contiguous()
        self.carried = None if carried is None else carried.contiguous()
        self.lasts: list[int] = []  # the step that each sweep so far ended with
        self._unbind_rings()
        # how many programs of a launch are done, so that the last of a sample knows it is; zero between launches
        self.tickets = torch.zeros(len(x), dtype=torch.int32, device=x.device)
        self.before.zero_()

    def iterate(self, age: int) -> Tensor:
        """[N + 1, samples, ...]. Age 0 is the newest, 1 the one that it was made from, -1 the one being written."""
        return self._iterates[(self.sweeps - age) % len(self._iterates)]

    def residual(self, age: int) -> Tensor:
        """How far a sweep moved the points before mixing, [N + 1, samples, ...]; age 0: the sweep under way."""
        return self._residuals[(self.sweeps - age) % len(self._residuals)]

    @property
    def x(self) -> Tensor:
        return self.iterate(0)

    @property
    def x0_prev(self) -> Tensor | None:
        return None if self.carried is None else self.carried[0]

    @property
    def before(self) -> Tensor:
        """The points that `m` was evaluated at. During a sweep `m` is already newer."""
        return self.iterate(1)

    @property
    def after(self) -> Tensor:
        return self.iterate(-1)

    @property
    def sweeps(self) -> int:
        return len(self.lasts)

    def advance(self, last: int) -> None:
        """Finish a sweep that ended with this step: the points being written become the newest."""
        self.lasts.append(last)

    def keep(self, index: Tensor) -> None:
        """Continue with the samples at these indices only."""
        self.iterates, self.residuals = self.iterates.index_select(2, index), self.residuals.index_select(2, index)
        self._unbind_rings()
        self.m = self.m.index_select(1, index)
        self.draws = None if self.draws is None else self.draws.index_select(1, index)
        self.carried = None if self.carried is None else self.carried.index_select(1, index)

    def _unbind_rings(self) -> None:
        self._iterates, self._residuals = self.iterates.unbind(), self.residuals.unbind()
