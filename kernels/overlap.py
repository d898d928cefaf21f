"""Checks of where tensors lie in memory."""

from __future__ import annotations

from torch import Tensor

from srds_fast.errors import InvalidArgument


def check_trailing(name: str, tensor: Tensor, leading: int) -> None:
    """Raise unless the dimensions after the leading ones lie in memory in their order, without gaps."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[leading:]), reversed(tensor.stride()[leading:]), strict=True):
        if size > 1 and stride != expected:
            raise InvalidArgument(
                f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}. "
                f"Its last {tensor.dim() - leading} dimensions must be contiguous. Pass it with .contiguous()."
            )
        expected *= size


def check_out(out: Tensor, in_place: tuple[str, Tensor], **read: Tensor | None) -> None:
    """Raise if writing out would change what is still to be read, or if its elements share memory.

    in_place: name and tensor that out may be. read: all that is read, that one's storage as the first.
    """
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise InvalidArgument(f"out has strides {out.stride()}: elements share memory. Pass a tensor of its own.")
    name, allowed = in_place
    same = out.data_ptr() == allowed.data_ptr() and all(
        size == 1 or one == other for size, one, other in zip(out.shape, out.stride(), allowed.stride(), strict=True)
    )
    overlapping = [each for each, tensor in read.items() if tensor is not None and _overlap(out, tensor)]
    if same and overlapping:
        overlapping = overlapping[1:]
    if overlapping:
        raise InvalidArgument(
            f"out overlaps {' and '.join(overlapping)} in memory. It may be {name} itself, else it must be apart. "
            "Pass another tensor."
        )


def check_apart(name: str, written: Tensor, **read: Tensor | None) -> None:
    """Raise if writing a tensor may change one that is read."""
    overlapping = [each for each, tensor in read.items() if tensor is not None and _overlap(written, tensor)]
    if overlapping:
        raise InvalidArgument(
            f"{name} overlaps {' and '.join(overlapping)} in memory. It must be apart. Pass another tensor."
        )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether the spans of memory from first to last element meet."""

    def end(tensor: Tensor) -> int:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr() + (last + 1) * tensor.itemsize

    return one.data_ptr() < end(other) and other.data_ptr() < end(one)
