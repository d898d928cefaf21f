"""Streams of calls that run on the stock loop because it is the fastest: the x0 that its steps predict, and its end."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor

from ..engine.run import Observer
from ..engine.x0_previews import Due, preview
from ..sampling.rows import state_dtype
from ..schedulers.table import NoiseTable
from ..schedulers.verify import noise_table
from ..solvers.contract import Checkpoint
from .lockstep.proxies import copy_scheduler


class StockPreviews:
    """Looks at the steps of one loop. observer: is shown them."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._table: NoiseTable | None = None
        self._last: Tensor | None = None  # state that the last step has returned, [batch, ...]
        self._due: Due
        self._step = self._start = 0

    def look_at(self, scheduler: Any) -> None:
        """Look at each step of a scheduler, whose loop has not begun."""
        step = scheduler.step

        @functools.wraps(step)  # pipelines look at its signature
        def step_and_show(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(step).bind(*args, **kwargs).arguments
            self._show(scheduler, given)
            found = step(*args, **kwargs)
            self._last = found[0]
            return found

        scheduler.step = step_and_show

    def _show(self, scheduler: Any, given: dict[str, Any]) -> None:
        x = given["sample"]
        if self._table is None:
            own = copy_scheduler(scheduler)
            del own.step  # the scheduler's own step is read, which is not looked at
            self._table = noise_table(own, eta=given.get("eta"))
            found = (scheduler.timesteps == given["timestep"]).nonzero()
            self._start = int(found[0]) if len(found) else 0
            self._due = Due(self._table.num_steps - self._start)
        self._step += 1
        m = self._table.prediction_of(given["model_output"], x)
        if self._due.is_now(self._step) and m.shape == x.shape:
            dtype = state_dtype(x.dtype)
            x0 = self._table.predict_x0(self._start + self._step - 1, x.to(dtype), m.to(dtype))
            self._observer(preview(self._step, x0, tuple(range(len(x)))))

    def end(self) -> None:
        """Show the last state: the result of the call."""
        if (last := self._last) is not None:
            found = Checkpoint(0, last, tuple(range(len(last))), None, exact=True)
            self._observer(found.copied(final=True))
