"""Which implementation a call runs: the Triton kernel on CUDA, Triton's interpreter in tests, else the reference."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Literal

import torch

from srds_fast.errors import InvalidArgument

Implementation = Literal["triton", "triton interpreter", "torch"]


def implementation(device: torch.device) -> Implementation:
    """The implementation that runs for tensors on a device.

    SRDS_FAST_KERNELS=torch in the environment selects the references on CUDA too, for machines without a C compiler for
    Triton's launchers, or to find out whether a kernel is wrong; other values than "triton" raise InvalidArgument. With
    TRITON_INTERPRET=1, set before the first import of triton, kernels are interpreted on the CPU, slowly: for tests.
    """
    asked = os.environ.get("SRDS_FAST_KERNELS") or "triton"
    if asked not in ("triton", "torch"):
        raise InvalidArgument(f"SRDS_FAST_KERNELS is {asked!r}. It must be 'triton' or 'torch'. Correct or unset it.")
    if device.type == "cuda" and _has_triton() and asked == "triton":
        return "triton"
    if device.type == "cpu" and interpreted():
        return "triton interpreter"
    return "torch"


@cache
def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
