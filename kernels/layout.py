"""How the elements of a tensor lie in memory, seen in the order of another one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from srds_fast.errors import InvalidArgument


class Inner(NamedTuple):
    """Element e lies at (e // inner) * outer_stride + (e % inner) * inner_stride."""

    inner: int
    outer_stride: int
    inner_stride: int


def inner_layout(name: str, tensor: Tensor, memory: Tensor, leading: int = 2) -> Inner:
    """Where the elements behind the leading dimensions of `tensor` lie, counted in the order of those of `memory`.

    Both in one order, without gaps: Inner(elements, 0, 1). Channels last beside contiguous takes the general form.

    Raises:
        InvalidArgument: naming the tensor, if it takes more than two strides to say.
    """
    dimensions = sorted(range(leading, memory.ndim), key=memory.stride)
    groups: list[list[int]] = []  # innermost first: size and stride
    for dimension in dimensions:
        size, stride = tensor.shape[dimension], tensor.stride(dimension)
        if size == 1:
            continue
        if groups and stride == groups[-1][0] * groups[-1][1]:
            groups[-1][0] *= size
        else:
            groups.append([size, stride])
    if len(groups) > 2:
        raise InvalidArgument(
            f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}. Its states must be contiguous or "
            "channels last. Pass it with .contiguous()."
        )
    if not groups:
        return Inner(1, 0, 1)
    inner, inner_stride = groups[0]
    return Inner(inner, groups[1][1] if len(groups) == 2 else 0, inner_stride)
