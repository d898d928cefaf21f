"""What records and replays on a device. On CUDA devices these are CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol, TypeVar

import torch

from ...errors import CaptureFailed
from .capture_checks import CaptureCheck
from .cuda import CudaRecorder

T = TypeVar("T")

# of the free memory, for recordings: the rest is for the decoder, and for calls of other shapes
LARGEST_SHARE = 0.5


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Do it again: one launch."""


class Recorder(Protocol):
    """Records work on one device."""

    def record(self, work: Callable[[CaptureCheck], T]) -> tuple[Graph, CaptureCheck, T]:
        """Run `work` once in Python, under a check that it is given. Its effects appear with the first replay.

        Returns the graph, the check, and what `work` returned: replays write to the tensors in it. Raises CaptureFailed
        where an operation cannot be repeated; nothing has been changed then.
        """

    def release(self) -> None:
        """Give memory back to the device, if no recording is left."""


# by type of device; tests add a recorder for the CPU
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}


@cache
def recorder(device: torch.device) -> Recorder:
    """The recorder of a device, which has its index. `NetworkCalls.why_not` tells whether there is one."""
    return RECORDERS[device.type](device)


def record(recorder: Recorder, work: Callable[[CaptureCheck], T]) -> tuple[Graph, CaptureCheck, T]:
    """`Recorder.record` without autocast's cache: replays would never cast a weight again that was found there."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        return recorder.record(work)
    finally:
        torch.set_autocast_cache_enabled(cached)


class TooLarge(CaptureFailed):
    """A recording that would take too much memory or too long to make. A smaller one may do."""


def within_memory(device: torch.device, name: str, make: Callable[[], T], held: int = 0) -> tuple[T, int]:
    """Make a recording, and return it with the bytes that its device has less, 0 where that cannot be asked.

    held: bytes that earlier recordings of the same network have taken. Raises TooLarge above `LARGEST_SHARE`.
    """
    free = free_memory(device)
    made = make()
    if free is None:
        return made, 0
    taken = max(0, free - (free_memory(device) or 0))
    if held + taken > LARGEST_SHARE * (held + free):
        raise TooLarge(
            f"The {name} would take {(held + taken) / 2**30:.1f} of {(held + free) / 2**30:.1f} GiB that are free. "
            "Decoding needs memory too. Lower max_rows or max_graphs."
        )
    return made, taken


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where that cannot be asked."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # the allocator keeps memory of the eager run that a capture could use
    return torch.cuda.mem_get_info(device)[0]
