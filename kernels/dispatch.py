"""Which implementation a call runs: the Triton kernel on CUDA, its interpreter on request, the reference elsewhere."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Literal

import torch

Implementation = Literal["triton", "triton interpreter", "torch"]


def implementation(device: torch.device) -> Implementation:
    """What runs for tensors on a device.

    Triton's interpreter runs kernels on the CPU if TRITON_INTERPRET=1 was set before anything imported triton; it is
    for tests, and slow.
    """
    if device.type == "cuda" and _has_triton():
        return "triton"
    if device.type == "cpu" and interpreted():
        return "triton interpreter"
    return "torch"


@cache
def interpreted() -> bool:
    """Whether kernels are interpreted, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
