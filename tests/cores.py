"""Solver cores fed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from problems import scheduler
from torch import Tensor

from srds_fast.schedulers.table import NoiseTable
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers import program
from srds_fast.solvers.contract import NO_INPUTS, Checkpoint, Core, Evaluate, SolverInputs
from srds_fast.solvers.sequential import sequential

Denoiser = Callable[[Tensor, Tensor], Tensor]
Keep = Callable[[Checkpoint], tuple[int, ...] | None]


def table(num_steps: int, stock: Any = None, eta: float = 0.0, **config: object) -> NoiseTable:
    """The steps of a scheduler, by default of DDIM without clipping."""
    stock = stock or scheduler(**config)
    stock.set_timesteps(num_steps)
    return noise_table(stock, eta=eta)


def feed(
    core: Core, denoiser: Denoiser, grid: NoiseTable, keep: Keep = lambda checkpoint: None, by_row: bool = False
) -> tuple[Tensor, list[Evaluate], list[Checkpoint]]:
    """Run a core to its end.

    keep: answers checkpoints with the samples that go on. by_row: one network call per state of a wave.
    """
    waves, checkpoints = [], []
    answer: Tensor | tuple[int, ...] | None = None
    try:
        while True:
            event = core.send(answer)
            if isinstance(event, Evaluate):
                waves.append(event)
                x = event.x.flatten(0, 1)
                t = grid.timesteps[event.steps(grid.num_steps).flatten()]
                size = 1 if by_row else len(x)
                outputs = torch.cat([denoiser(*each) for each in zip(x.split(size), t.split(size), strict=True)])
                answer = outputs.view_as(event.x).to(event.x.dtype)
            else:
                checkpoints.append(event)
                answer = keep(event)
    except StopIteration as stop:
        return stop.value, waves, checkpoints


def one_by_one(x: Tensor, grid: NoiseTable, denoiser: Denoiser, inputs: SolverInputs = NO_INPUTS, **how: Any) -> Tensor:
    """The sample of the sequential core."""
    return feed(sequential(x, grid, program.sequential(grid.num_steps), inputs), denoiser, grid, **how)[0]


def assert_close(found: Tensor, expected: Tensor, relative: float = 1e-10) -> None:
    """Equal up to rounding, relative to the largest element."""
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= relative * max(1.0, float(expected.abs().max()))
