"""The scheduler as it is before each of its steps, for turns that are made in any order.

A loop may ask its scheduler for more than a step: to scale the network's input, for a sigma, for the noise of another
step. The answers depend on what the scheduler has stepped before. So a copy of it steps a sample of a single number
through the whole grid, and what the copy holds before each step, and after the last one, is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...caches import Cache, of_process
from ...engine.merging.rule import same
from ...schedulers.own_loop import OwnLoop, StepCall
from ...schedulers.private_draws import PrivateDraws
from ...schedulers.reader import state_key
from .turns import refused

MOST_KEPT = 8


@dataclass(frozen=True)
class Snapshots:
    """The attributes of a scheduler between its steps, and the dtype in which its last step returns the sample.

    keeps_sample: it keeps the very tensor that its step is given, for a later step. returns: how many values a step
    returns. ends_alike: all values of the last step are equal, as the sample and the predicted x0 of a scheduler that
    ends at x0.
    """

    kind: type
    states: list[dict[str, Any]]
    dtype: torch.dtype
    keeps_sample: bool
    returns: int
    ends_alike: bool

    def before(self, step: int) -> Any:
        """A scheduler as it is before a step, and after the one before that. The loop may change it."""
        twin: Any = object.__new__(self.kind)
        vars(twin).update(_copied(self.states[step]))
        return twin


class PlainScheduler:
    """A scheduler for a user to look at, and to write into: its tensors are copies."""

    def __init__(self, kind: type) -> None:
        self._scheduler: Any = object.__new__(kind)
        self._state: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}  # of which its own are copies

    def before(self, state: dict[str, Any]) -> Any:
        """The scheduler, as it is in a state."""
        held, last, self._state = vars(self._scheduler), self._state, state
        for name, value in state.items():
            if last.get(name, ...) is not value or isinstance(value, list):
                self._tensors.pop(name, None)
                held[name] = list(value) if isinstance(value, list) else value
                if isinstance(value, Tensor):
                    self._tensors[name], held[name] = value, value.clone()
        return self._scheduler

    def changed_in(self, scheduler: Any) -> str | None:
        """The name of a tensor with other numbers in a scheduler, which may be another one; None: there is none."""
        held = vars(scheduler)
        return next((name for name, kept in self._tensors.items() if not _same_numbers(held.get(name), kept)), None)


def _same_numbers(value: Any, kept: Tensor) -> bool:
    return isinstance(value, Tensor) and same(value.to(kept.device), kept)


_kept: Cache[Snapshots] = of_process("schedulers between steps", MOST_KEPT)


def snapshots(scheduler: Any, start: int, steps: int, call: StepCall, x: Tensor, m: Tensor) -> Snapshots:
    """Snapshots of a scheduler that is about to make these steps of its grid; it is not changed.

    call: how the loop calls the step. x, m: sample and output of the first step, of which the dtypes count.
    """
    key = state_key(scheduler), start, steps, call, (x.dtype, m.dtype, x.device, x.ndim)
    found = _kept.get(key)
    if found is None:
        found = _stepped(scheduler, start, steps, call, x, m)
        _kept[key] = found
    return found


def _stepped(scheduler: Any, start: int, steps: int, call: StepCall, x: Tensor, m: Tensor) -> Snapshots:
    twin: Any = object.__new__(type(scheduler))
    vars(twin).update(_copied(vars(scheduler)))
    generator, options = torch.Generator().manual_seed(0), {"return_dict": False}
    loop = OwnLoop(twin, call, start, copied=False, device=x.device, generator=generator, options=options)
    sizes = [1] * m.ndim
    if m.shape != x.shape:  # it also holds a predicted variance
        sizes[1] = m.shape[1] // x.shape[1]
    sample, output = x.new_ones([1] * x.ndim), m.new_ones(sizes)
    states, keeps_sample = list[dict[str, Any]](), False
    try:
        with PrivateDraws():
            for _ in range(steps):
                states.append(_copied(vars(twin)))
                loop.scaled(sample)
                after = loop.step(output, sample)
                keeps_sample |= any(value is sample for value in vars(twin).values())
                sample = after
            states.append(_copied(vars(twin)))
    except Exception as error:
        raise refused(f"{type(scheduler).__name__} cannot step a single number ({error})") from error
    alike = all(isinstance(each, Tensor) and torch.equal(each, sample) for each in loop.returned)
    return Snapshots(type(scheduler), states, sample.dtype, keeps_sample, len(loop.returned), alike)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy in which lists are other lists: steps write into those, and into no tensor."""
    return {name: list(value) if isinstance(value, list) else value for name, value in state.copy().items()}
