"""What runs the waves of a program."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from ..solvers.contract import Evaluate


class Evaluator(Protocol):
    """Runs the waves of a recording."""

    def __call__(self, wave: Evaluate) -> Tensor:
        """The network's output at a wave, [branches * rows, samples, ...]."""

    def prepare(self) -> None:
        """Copy to the device what the waves of a whole batch would copy when they need it."""

    def constants(self) -> Iterable[Tensor]:
        """What was copied."""

    def repeat(self, wave: Evaluate) -> None:
        """Repeat the conditioning for the rows of a wave, and those of narrower ones."""

    def forget(self) -> None:
        """Give the repeated conditioning back."""
