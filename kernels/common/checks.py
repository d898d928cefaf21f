"""Checks of arguments. Every error names the argument, says what is wrong and what the argument must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from srds_fast.errors import InvalidArgument

NETWORK_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# of one sample's state: kernels index its elements in 32 bits, a block at a time
MOST_ELEMENTS = 2**31 - 2**14


def check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    shape: Sequence[int] | None = None,
    meaning: str = "",
) -> None:
    """Raise InvalidArgument unless a tensor is like this. meaning: of its shape, as in "[rows, samples, ...]"."""
    if tensor.dtype not in dtypes:
        allowed = ", ".join(map(str, dtypes))
        raise InvalidArgument(f"{name} is {tensor.dtype}. It must be one of {allowed}. Convert it with .to().")
    if tensor.device != device:
        raise InvalidArgument(
            f"{name} is on {tensor.device}. The other tensors are on {device}. Move it with .to({str(device)!r})."
        )
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise InvalidArgument(
            f"{name} has shape {tuple(tensor.shape)}. It must be {meaning}, here {tuple(shape)}. Pass such a tensor."
        )


def check_guidance(guidance: Tensor | None, state: Tensor) -> int:
    """Check the weights of the guidance branches, [branches] or None, and return how many branches there are."""
    if guidance is None:
        return 1
    check_tensor("guidance", guidance, (state.dtype,), state.device)
    if guidance.dim() != 1 or len(guidance) == 0 or not guidance.is_contiguous():
        raise InvalidArgument(
            f"guidance has shape {tuple(guidance.shape)} and strides {guidance.stride()}. It must be [branches] and "
            "contiguous. Pass a weight per branch."
        )
    return len(guidance)
