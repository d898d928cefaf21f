"""The memory layout of states [rows, samples, ...] whose elements are counted in the memory order of another tensor."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Inner(NamedTuple):
    """Element e of a state lies at (e // inner) * outer_stride + (e % inner) * inner_stride."""

    inner: int
    outer_stride: int
    inner_stride: int


def with_inner_layout(tensor: Tensor, memory: Tensor) -> tuple[Tensor, Inner]:
    """A tensor and the layout of its states, with elements counted in the memory order of `memory`.

    Both tensors in the same order and without gaps: Inner(elements, 0, 1). A channels-last tensor beside a contiguous
    one needs two strides. A tensor that needs more is copied.
    """
    if tensor.is_contiguous() and memory.is_contiguous():
        return tensor, Inner(math.prod(tensor.shape[2:]), 0, 1)
    groups = _groups(tensor, memory)
    if len(groups) > 2:
        return with_inner_layout(tensor.contiguous(), memory)
    (inner, inner_stride), (_, outer_stride) = [*(groups or [(1, 1)]), (1, 0)][:2]
    return tensor, Inner(inner, outer_stride, inner_stride)


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
