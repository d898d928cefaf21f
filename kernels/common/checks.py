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
    """Raise InvalidArgument unless a tensor has one of these dtypes, this device and this shape.

    Args:
        shape: None if the caller checks it.
        meaning: of its dimensions, as in "[rows, samples, ...]".
    """
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise InvalidArgument(f"{name} is {tensor.dtype}. It must be one of {allowed}. Convert it with .to().")
    if tensor.device != device:
        raise InvalidArgument(
            f"{name} is on {tensor.device}. The other tensors are on {device}. Move it with .to({str(device)!r})."
        )
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise InvalidArgument(
            f"{name} has shape {tuple(tensor.shape)}. It must be {meaning}, here {tuple(shape)}. Pass such a tensor."
        )


def check_guidance(guidance: Tensor | None, state: Tensor, most: int | None = None) -> int:
    """Check the weights of the guidance branches, and return how many branches there are.

    Args:
        guidance: [branches], contiguous, in the dtype and on the device of the state; None: one branch, weight 1.
        most: branches allowed; None: any number.
    """
    if guidance is None:
        return 1
    check_tensor("guidance", guidance, (state.dtype,), state.device)
    if guidance.dim() != 1 or len(guidance) == 0 or (most is not None and len(guidance) > most):
        count = "" if most is None else f", 1 to {most}"
        raise InvalidArgument(
            f"guidance has shape {tuple(guidance.shape)}. It must be [branches]{count}. Pass a weight per branch."
        )
    if not guidance.is_contiguous():
        raise InvalidArgument(
            f"guidance has strides {guidance.stride()}. It must be contiguous. Pass it with .contiguous()."
        )
    return len(guidance)
