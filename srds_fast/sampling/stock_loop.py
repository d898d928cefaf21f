"""The loop that a user would write without this package: a denoiser and the steps of a scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..engine import cancellation
from ..engine.distributed import call as distributed
from ..engine.run import Observer
from ..engine.x0_previews import Due, preview
from ..planner.exploration import STOCK, Exploration
from ..schedulers.own_loop import OwnLoop
from ..schedulers.table import NoiseTable
from ..solvers.contract import Checkpoint
from ..telemetry.report import BY_SEQUENTIAL, Report, stock_report
from .rows import Denoiser, state_dtype
from .trials import TurnClock


@dataclass(frozen=True)
class StockLoop:
    """The loop of one call of `sample`. options: further arguments of the scheduler's step."""

    denoiser: Denoiser
    x: Tensor
    scheduler: Any  # with its timesteps set
    cond: Mapping[str, Tensor]
    noise: NoiseTable
    options: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, turned: Callable[[int, Tensor, Tensor], None]) -> Tensor:
        """turned: told the number of each step, the state that it departs from, and the network's output there."""
        loop = OwnLoop(self.scheduler, self.noise.call, options=self.options)
        x, watch = self.x, cancellation.current()
        for step, t in enumerate(self.noise.timesteps):
            if watch is not None:
                watch.wave(1, step)
            m = self.denoiser(loop.scaled(x), t.to(x.device).expand(len(x)), **self.cond)
            turned(step, x, m)
            x = distributed.of_first(loop.step(m, x))
        return x

    def seconds(self, turns: int) -> float:
        """Seconds of all turns, by the first ones."""
        clock = TurnClock(turns, self.x.device)
        return clock.seconds(lambda: self(lambda *_: clock.turned()))

    def result(self, exploration: Exploration, observer: Observer | None) -> tuple[Tensor, Report]:
        """The sample and the report of a call that runs on this loop, as an exploration has chosen.

        observer: of a stream.
        """
        seconds, found = self._timed(observer)
        report = stock_report(
            self.noise.num_steps,
            seconds,
            path="sample",
            plan_reason=exploration.why,
            plan_state=exploration.state,
            plan_changed=exploration.taken(STOCK),
            stopped_by=[BY_SEQUENTIAL] * len(found),
            estimated_error=[None] * len(found),
            ranks=distributed.size(),
        )
        return found, report

    def _timed(self, observer: Observer | None) -> tuple[float, Tensor]:
        due, samples, dtype = Due(self.noise.num_steps), tuple(range(len(self.x))), state_dtype(self.x.dtype)

        def show(step: int, x: Tensor, m: Tensor) -> None:
            if observer is not None and due.is_now(step + 1):
                observer(preview(step + 1, self.noise.predict_x0(step, x.to(dtype), m.to(dtype)), samples))

        started = time.perf_counter()
        found = self(show)
        if observer is not None:
            observer(Checkpoint(0, found, samples, None, exact=True).copied(final=True))
        if found.is_cuda:
            torch.cuda.synchronize(found.device)
        return time.perf_counter() - started, found
