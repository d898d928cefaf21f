"""What records and replays: CUDA graphs, or on the CPU a tape of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from .capture_checks import Guard

T = TypeVar("T")


class Graph(Protocol):
    """A recorded stretch."""

    def replay(self) -> None:
        """Do it again: one launch."""

    def reset(self) -> None:
        """Give its memory back."""


class Recorder(Protocol):
    """Records stretches on one device.

    Attributes:
        name: of its kind, for reports.
    """

    name: str

    def record(self, work: Callable[[Guard], T]) -> tuple[Graph, T]:
        """Run `work` once in Python, given the guard that watches it. What it does is not done until the first replay.

        Tensors that work returns or keeps are those that replays write to.

        Raises:
            CaptureFailed: an operation cannot be repeated; nothing has been changed.
        """

    def release(self) -> None:
        """Give memory back to the device, if nothing is recorded any more."""
