"""Checks of arguments. Every error names the argument, says what is wrong and what it must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from srds_fast.errors import InvalidArgument

STATE_DTYPES = (torch.float32, torch.float64)
# of a sample: kernels count them in 32 bits, block by block
MOST_ELEMENTS = 2**31 - 2**14
NETWORK_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> None:
    """Raise unless the tensor has this shape. meaning: of its dimensions, as "[rows, samples, ...]"."""
    if tuple(tensor.shape) != tuple(shape):
        raise InvalidArgument(
            f"{name} has shape {tuple(tensor.shape)}. It must be {meaning}, here {tuple(shape)}. Pass such a tensor."
        )


def check_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless the tensor is of one of these dtypes."""
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise InvalidArgument(f"{name} is {tensor.dtype}. It must be one of {allowed}. Convert it with .to().")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise unless the tensor is on this device."""
    if tensor.device != device:
        raise InvalidArgument(
            f"{name} is on {tensor.device}. The other tensors are on {device}. Move it with .to({str(device)!r})."
        )


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise unless the tensor lies in memory in the order of its dimensions, without gaps."""
    if not tensor.is_contiguous():
        raise InvalidArgument(
            f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}. It must be contiguous. "
            "Pass it with .contiguous()."
        )
