"""What records and replays on a device. On CUDA devices these are CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from .capture_checks import CaptureCheck

T = TypeVar("T")


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Do it again: one launch."""

    def reset(self) -> None:
        """Give its memory back."""


class Recorder(Protocol):
    """Records work on one device.

    Attributes:
        name: of its kind, for reports.
    """

    name: str

    def record(self, work: Callable[[CaptureCheck], T]) -> tuple[Graph, T]:
        """Run `work` once in Python, given the check that watches it. Its effects appear with the first replay.

        Replays write to the tensors that `work` returns or keeps.

        Raises:
            CaptureFailed: an operation cannot be repeated; nothing has been changed.
        """

    def release(self) -> None:
        """Give memory back to the device, if no recording is left."""


def recorded(recorder: Recorder, work: Callable[[CaptureCheck], T]) -> tuple[Graph, CaptureCheck, T]:
    """Record work; returns the graph, the check that watched it, and what it returned.

    Raises:
        CaptureFailed: an operation cannot be repeated.
    """
    checks: list[CaptureCheck] = []

    def watched(check: CaptureCheck) -> T:
        checks.append(check)
        return work(check)

    # A weight that autocast has cast and cached would be read from the cache; replays would never cast it again.
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        graph, found = recorder.record(watched)
    finally:
        torch.set_autocast_cache_enabled(cached)
    (check,) = checks
    return graph, check, found
