"""The recorder of each device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from .recorder import Recorder


def _cuda(device: torch.device) -> Recorder:
    from .cuda import CudaRecorder

    return CudaRecorder(device)


# by type of device; tests add a recorder for the CPU
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": _cuda}


@cache
def recorder(device: torch.device) -> Recorder:
    """The recorder of a device, which has its index. `why_no_recorder` tells whether there is one."""
    return RECORDERS[device.type](device)


def why_no_recorder(device: torch.device) -> str | None:
    """Why nothing can be recorded on a device, or None."""
    return None if device.type in RECORDERS else f"graphs need a CUDA device, and the network is on {device.type}"
