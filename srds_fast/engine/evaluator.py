"""The interface of what runs the network for the waves of a program."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from ..solvers.contract import Evaluate


class Evaluator(Protocol):
    """Runs the network for the waves of a program."""

    def __call__(self, wave: Evaluate) -> Tensor:
        """The network's output at a wave, [branches * rows, samples, ...]."""

    def prepare(self) -> None:
        """Copy to the device now what waves of the whole batch would copy later."""

    def constants(self) -> Iterable[Tensor]:
        """The tensors that were copied."""

    def repeat(self, wave: Evaluate) -> None:
        """Repeat the conditioning for the rows of a wave; narrower waves take a slice of it."""

    def forget(self) -> None:
        """Free the repeated conditioning."""
