"""Whether two tensors share memory."""

from __future__ import annotations

from torch import Tensor

from srds_fast.errors import InvalidArgument


def check_apart(name: str, written: Tensor, **read: Tensor | None) -> None:
    """Raise if writing one tensor may change another that is read."""
    overlapping = [each for each, tensor in read.items() if tensor is not None and _overlap(written, tensor)]
    if overlapping:
        raise InvalidArgument(
            f"{name} overlaps {' and '.join(overlapping)} in memory. It must be apart. Pass another tensor."
        )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether the memory spans from first to last element meet."""

    def end(tensor: Tensor) -> int:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr() + (last + 1) * tensor.itemsize

    return one.data_ptr() < end(other) and other.data_ptr() < end(one)
