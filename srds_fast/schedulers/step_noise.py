"""The noise that a scheduler's steps add, found by asking them: on samples and outputs of zeros they add nothing else.

For steps that draw more than once, or otherwise than with the generator that they are given: one may follow a Brownian
path of its own. Generators are then used draw by draw as in the scheduler's own loop, by the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .own_loop import OwnLoop, StepCall, copy_scheduler
from .reader import Triangles


@dataclass(frozen=True, eq=False)
class StepNoise:
    """Asks the steps of a loop that begins at timestep `start`."""

    scheduler: Any
    call: StepCall
    start: int = 0

    @classmethod
    def where_needed(cls, scheduler: Any, call: StepCall, steps: Triangles) -> StepNoise | None:
        """None: the noise is one draw of each step at most, by the generator that it is given. steps: as read."""
        return None if steps.draws_once else cls(copy_scheduler(scheduler), call)

    def begun_at(self, start: int) -> StepNoise:
        """Of a loop that begins later; start: counted from where this one begins."""
        return replace(self, start=self.start + start)

    def of(
        self, sizes: Sequence[float], like: Tensor, dtype: torch.dtype, sample_dtype: torch.dtype, generator: Any
    ) -> Iterator[Tensor]:
        """What each step adds, in units of its size, [batch, ...]; zeros where that is zero.

        sizes: of the noise of each step. like: network output of one step, [batch, ...]. dtype: of the result.
        sample_dtype: of the samples that the steps are given. generator: as a loop gives it.
        """
        loop = OwnLoop(self.scheduler, self.call, self.start, device=like.device, generator=generator)
        for size in sizes:
            x = torch.zeros_like(like, dtype=sample_dtype)
            # a step may make tensors where it is told nothing; on the meta device they hold no numbers
            with torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext():
                loop.scaled(x)
                added = loop.step(torch.zeros_like(like), x).to(dtype)
            yield added / size if size else torch.zeros_like(added)
