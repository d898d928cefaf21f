"""Several states that a loop steps in each turn, each with a scheduler of its own, as one state (video and audio).

The solver sees all of them as one. A loop steps its states one after another, but the next turn is known only when the
last of them has been stepped. So the steps before that return tensors that are filled then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .turns import refused


class JointSteps:
    """Gathers the steps of a turn. count: of the schedulers; of a single one the steps are passed on as they are."""

    def __init__(self) -> None:
        self.count = 1
        self._stepped: list[tuple[Tensor, Tensor]] = []  # outputs and states of this turn
        self._waiting: list[Tensor] = []  # that earlier steps of this turn returned

    def step(
        self, number: int, m: Tensor, x: Tensor, whole: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Step the state with a number; `whole` takes the outputs and states of all, [batch, numbers of all states]."""
        if self.count == 1:
            return whole(m, x)
        if number != len(self._stepped):
            raise refused("it steps its states in another order than it has made their schedulers")
        if m.shape != x.shape:
            raise refused("it steps several states, one of them with an output of another shape")
        self._stepped.append((m, x))
        if len(self._stepped) < self.count:
            self._waiting.append(torch.empty_like(x))
            return (self._waiting[-1],)
        outputs, states = zip(*self._stepped, strict=True)
        if len({(len(each), each.dtype) for each in (*outputs, *states)}) > 1:
            raise refused("it steps several states of different batches or dtypes")
        self._stepped.clear()
        found, *rest = whole(_joined(outputs), _joined(states))
        parts = found.split([each[0].numel() for each in states], dim=1)
        after = [part.reshape(each.shape) for part, each in zip(parts, states, strict=True)]
        for waiting, state in zip(self._waiting, after[:-1], strict=True):
            waiting.copy_(state)
        self._waiting.clear()
        return after[-1], *rest


def _joined(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)
