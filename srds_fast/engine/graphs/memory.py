"""How much of a device's memory recordings may take."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ...errors import CaptureFailed

T = TypeVar("T")

# of the free memory: the rest is for the decoder, and for calls of other shapes
LARGEST_SHARE = 0.5


def recorded_within_memory(device: torch.device, record: Callable[[], T], name: str, *, held: int = 0) -> tuple[T, int]:
    """Record, and refuse what takes too much.

    Args:
        device: where it is recorded.
        record: makes the recording.
        name: of its kind.
        held: bytes that recordings it belongs to have taken before.

    Returns:
        The recording, and the bytes that the device has less after it; 0 where that cannot be asked.

    Raises:
        CaptureFailed: it takes more than `LARGEST_SHARE` of the free memory.
    """
    free = free_memory(device)
    made = record()
    if free is None:
        return made, 0
    taken = max(0, free - (free_memory(device) or 0))
    if held + taken > LARGEST_SHARE * (held + free):
        raise TooLarge(
            f"The {name} would take {(held + taken) / 2**30:.1f} of {(held + free) / 2**30:.1f} GiB that are free. "
            "Room must be left to decode. Lower max_rows or max_graphs."
        )
    return made, taken


class TooLarge(CaptureFailed):
    """A recording that would take too much memory or too long to make. A smaller one may do."""


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where that cannot be asked."""
    if device.type != "cuda":
        return None
    # the allocator keeps memory of the eager run that a capture could use
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free
