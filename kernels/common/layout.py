"""The memory layout of states [rows, samples, ...] whose elements are counted in the memory order of another tensor."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from srds_fast.errors import InvalidArgument


class Inner(NamedTuple):
    """Element e of a state lies at (e // inner) * outer_stride + (e % inner) * inner_stride."""

    inner: int
    outer_stride: int
    inner_stride: int


def inner_layout(name: str, tensor: Tensor, memory: Tensor) -> Inner:
    """The layout of the states of `tensor`, with elements counted in the memory order of `memory`.

    Both tensors in the same order and without gaps: Inner(elements, 0, 1). A channels-last tensor beside a contiguous
    one needs two strides.

    Raises:
        InvalidArgument: two strides are not enough; the error names the tensor.
    """
    if tensor.is_contiguous() and memory.is_contiguous():
        return Inner(math.prod(tensor.shape[2:]), 0, 1)
    groups = _groups(tensor, memory)
    if len(groups) > 2:
        raise InvalidArgument(
            f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}. Its states must be contiguous or "
            "channels last. Pass it with .contiguous()."
        )
    if not groups:
        return Inner(1, 0, 1)
    inner, inner_stride = groups[0]
    return Inner(inner, groups[1][1] if len(groups) == 2 else 0, inner_stride)


def with_inner_layout(tensor: Tensor, memory: Tensor) -> Tensor:
    """The tensor itself if `inner_layout` can describe it, else a contiguous copy."""
    if tensor.is_contiguous() or len(_groups(tensor, memory)) <= 2:
        return tensor
    return tensor.contiguous()


def _groups(tensor: Tensor, memory: Tensor) -> list[tuple[int, int]]:
    """Size and stride of each run of evenly spaced elements, innermost in `memory` first."""
    groups: list[tuple[int, int]] = []
    for dimension in sorted(range(2, memory.ndim), key=memory.stride):
        size, stride = tensor.shape[dimension], tensor.stride(dimension)
        if size == 1:
            continue
        if groups and stride == groups[-1][0] * groups[-1][1]:
            groups[-1] = groups[-1][0] * size, groups[-1][1]
        else:
            groups.append((size, stride))
    return groups
