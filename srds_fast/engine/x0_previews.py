"""Previews of runs that have no whole sample before their end: the x0 that the network predicts on the way."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.common.network_input import guided
from ..schedulers.table import NoiseTable
from ..solvers.contract import X0_PREVIEW, Checkpoint, Evaluate, SolverInputs

# previews of a run, at most
MOST = 8

Show = Callable[[Checkpoint], None]


class Due:
    """Which steps of a run are shown: every few of them, but not the last, behind which comes the sample."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps, self._every = num_steps, max(1, math.ceil(num_steps / MOST))
        self._next = self._every

    def is_now(self, done: int) -> bool:
        """Whether to show the x0 of the step that makes so many done. Each is asked for once, in ascending order."""
        if not self._next <= done < self._num_steps:
            return False
        self._next = (done // self._every + 1) * self._every
        return True


class X0Previews:
    """Shows predicted x0 of the waves of one run. dtype: of the state.

    A wave of several rows is shown by the first of the grid: all that comes before it has settled.
    """

    def __init__(self, noise: NoiseTable, inputs: SolverInputs, dtype: torch.dtype, show: Show) -> None:
        self._noise, self._inputs, self._dtype, self._show = noise, inputs, dtype, show
        self._due = Due(noise.num_steps)

    def look(self, wave: Evaluate, output: Tensor) -> None:
        """A wave was run. output: of the network, [branches * rows, samples, ...]."""
        step = min(wave.positions)
        if not self._due.is_now(step + 1):
            return
        inputs, row = self._inputs, wave.positions.index(step)
        x = wave.x[row].to(self._dtype)  # of the first branch; all are given the same state
        m = guided(output, inputs.guidance, self._dtype)[row]
        if wave.shifts is None:
            x0 = self._x0(step, x, m)
        else:
            of_samples = zip(wave.steps(self._noise.num_steps)[row].tolist(), x.split(1), m.split(1), strict=True)
            x0 = torch.cat([self._x0(*each) for each in of_samples])
        self._show(preview(step + 1, x0, wave.samples))

    def _x0(self, step: int, x: Tensor, m: Tensor) -> Tensor:
        """As predicted at a step. x: the network's input, and m its output, [samples, ...]."""
        if self._inputs.scaled:
            x = x / self._noise.numbers["input_scale"][step]
        return self._noise.predict_x0(step, x, m)


def preview(done: int, x0: Tensor, samples: tuple[int, ...]) -> Checkpoint:
    """What a stream is shown of an x0, [samples, ...], that was predicted in the step that makes so many done."""
    return Checkpoint(done, x0, samples, None, exact=False, kind=X0_PREVIEW)
