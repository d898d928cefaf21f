"""The recorder of each device."""

from __future__ import annotations

from functools import cache

import torch

from .recorder import Recorder
from .tape import TapeRecorder


@cache
def recorder(device: torch.device) -> Recorder:
    """The recorder of a device; device: with its index."""
    if device.type != "cuda":
        return TapeRecorder()
    from .cuda import CudaRecorder

    return CudaRecorder(device)
