"""The eager engine: what runs the network for a wave, and the loop over the waves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from ..solvers.contract import Evaluate


class Evaluator(Protocol):
    """Runs the network for the waves of a program. One that repeats nothing for rows has a call alone."""

    def __call__(self, wave: Evaluate) -> Tensor:
        """The network's output at a wave, [branches * rows, samples, ...]."""

    def prepare(self) -> None:
        """Copy to the device now what waves of the whole batch would copy later."""
        return

    def constants(self) -> Iterable[Tensor]:
        """The tensors that were copied."""
        return ()

    def repeat(self, wave: Evaluate) -> None:
        """Repeat the conditioning for the rows of a wave; narrower waves take a slice of it."""
        return

    def forget(self) -> None:
        """Free the repeated conditioning."""
        return


@torch.no_grad()
def drain(next_wave: Callable[[Tensor | None], Evaluate | None], evaluate: Callable[[Evaluate], Tensor]) -> None:
    """Run waves until none is left. next_wave: takes the output of the last one, None at first."""
    wave = next_wave(None)
    while wave is not None:
        wave = next_wave(evaluate(wave))
