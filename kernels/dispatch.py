"""Which implementation a call runs: the Triton kernel on CUDA, its interpreter on request, the reference elsewhere."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from srds_fast.errors import InvalidArgument

Implementation = Literal["triton", "triton interpreter", "torch"]


def implementation(device: torch.device) -> Implementation:
    """What runs for tensors on a device.

    SRDS_FAST_KERNELS=torch in the environment asks for the references on CUDA too: where Triton has no C compiler to
    build its launchers with, or to see whether a kernel is at fault. Triton's interpreter runs kernels on the CPU if
    TRITON_INTERPRET=1 was set before anything imported triton; it is for tests, and slow.

    Raises:
        InvalidArgument: SRDS_FAST_KERNELS asks for something else.
    """
    asked = os.environ.get("SRDS_FAST_KERNELS") or "triton"
    if asked not in ("triton", "torch"):
        raise InvalidArgument(f"SRDS_FAST_KERNELS is {asked!r}. It must be 'triton' or 'torch'. Correct or unset it.")
    if device.type == "cuda" and _has_triton() and asked == "triton":
        return "triton"
    if device.type == "cpu" and interpreted():
        return "triton interpreter"
    return "torch"


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make that the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@cache
def interpreted() -> bool:
    """Whether kernels are interpreted, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
