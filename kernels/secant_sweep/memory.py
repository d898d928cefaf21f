"""What a run of secant sweeps keeps from sweep to sweep."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .table import SecantTable


class SweepResult(NamedTuple):
    """What a sweep tells of the samples.

    Attributes:
        sample: [samples, ...], the last point.
        change: [samples], mean |x - x before| of the point that moved most, in units of its standard deviation.
        doubt: [samples], expected error of the last point from all that was interpolated.
        stationary: [samples] bool, no bit changed and all points were rows; None unless asked for.
        next_input: of the network at the next wave, [branches * rows, samples, ...]; None: there is none.
    """

    sample: Tensor
    change: Tensor
    doubt: Tensor
    stationary: Tensor | None
    next_input: Tensor | None


class Memory:
    """What a run keeps from sweep to sweep. Its tensors stay where they are, so that sweeps can be recorded.

    Args:
        table: of the grid.
        x: starting noise, [samples, ...]; its dtype is the dtype of the state.
        draws: [N, samples, ...], fresh noise of stochastic steps.
        carried: [vectors, samples, ...], what multistep schedulers have carried to x, with momentum the x0 before it.

    Attributes:
        iterates: ring of [N + 1, samples, elements]: the points of the last waves, and those being written.
        outputs: ring of [N, samples, elements]: the network's outputs at them.
        expected: [N, samples, elements], what the outputs are expected to change by at the newest points.
        doubts: [N, samples], what two interpolations of the outputs that were carried to a point differ by, summed
            since the network was asked there.
        shape: of a sample.
        sweeps: how many are done.
    """

    def __init__(self, table: SecantTable, x: Tensor, draws: Tensor | None, carried: Tensor | None) -> None:
        steps, flat = table.num_steps, x.flatten(1)
        self.shape = x.shape[1:]
        kept = max(1, table.history) + 1
        self.iterates = x.new_zeros(kept + 1, steps + 1, *flat.shape)
        self.outputs = x.new_zeros(kept, steps, *flat.shape)
        self.expected = x.new_zeros(steps, *flat.shape)
        self.doubts = x.new_zeros(steps, len(x))
        self.draws = None if draws is None else draws.flatten(2).contiguous()
        self.carried = None if carried is None else carried.flatten(2).contiguous()
        self.sweeps = 0

    @property
    def x0_prev(self) -> Tensor | None:
        return None if self.carried is None else self.carried[0]

    def points(self, age: int) -> Tensor:
        """[N + 1, samples, elements]. Age 0 is the newest, -1 is being written."""
        return self.iterates[(self.sweeps - age) % len(self.iterates)]

    def states(self, age: int) -> Tensor:
        """The same points, [N + 1, samples, ...]."""
        points = self.points(age)
        return points.view(*points.shape[:2], *self.shape)

    def output(self, age: int) -> Tensor:
        """The network's outputs at `points(age)`, [N, samples, elements]; age 0 is written in this sweep."""
        return self.outputs[(self.sweeps - age) % len(self.outputs)]

    def keep(self, index: Tensor) -> None:
        """Continue with the samples at these indices only."""
        self.iterates, self.outputs = self.iterates.index_select(2, index), self.outputs.index_select(2, index)
        self.expected, self.doubts = self.expected.index_select(1, index), self.doubts.index_select(1, index)
        self.draws = None if self.draws is None else self.draws.index_select(1, index)
        self.carried = None if self.carried is None else self.carried.index_select(1, index)
