"""What captured code must not do, seen as it is captured: every operation goes through here.

A replay repeats the launches of a capture and nothing else. An operation that waits for the device, copies from or to
the host, draws random numbers or has a shape that depends on values would freeze what it found in the capture, or break
it. It is refused by name before it runs, on a CUDA device as on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import CaptureFailed

_FROM_PYTHON = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}


class Guard(TorchDispatchMode):
    """Refuses operations that cannot be captured, and notes what is read from outside.

    Attributes:
        in_network: the operations that come now are those of the network.
        read: tensors that were there before the capture, in the order they were first read; held, so that their memory
            stays theirs.
        read_by_network: the part of them that the network reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_network = False
        self.read: list[Tensor] = []
        self.read_by_network: list[Tensor] = []
        self._made: set[int] = set()
        self._seen: set[tuple[int, bool]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refuse_uncapturable(func, args, kwargs)
        given = list(tensors_in((args, kwargs)))
        for tensor in given:
            self._note(tensor)
        self.before(func, given)
        out = func(*args, **kwargs)
        self._made.update(storage_of(tensor) for tensor in new_in(out, given))
        self.after(func, args, kwargs, out)
        return out

    def before(self, func: Any, given: list[Tensor]) -> None:
        """An operation is about to run on these tensors."""

    def after(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An operation has run."""

    @property
    def storages(self) -> set[int]:
        """Memory taken in this capture."""
        return self._made

    def made(self, tensor: Tensor) -> bool:
        """Whether the memory of a tensor was taken in this capture."""
        return storage_of(tensor) in self._made

    def _note(self, tensor: Tensor) -> None:
        storage = storage_of(tensor)
        # a view of what was there before is not made here
        if storage in self._made or (storage, self.in_network) in self._seen:
            return
        self._seen.add((storage, self.in_network))
        self.read.append(tensor)
        if self.in_network:
            self.read_by_network.append(tensor)


def refuse_uncapturable(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise CaptureFailed for an operation that a graph cannot hold."""
    what = None
    if func in _FROM_PYTHON:
        what = "makes a tensor from Python numbers, which a graph would freeze"
    elif torch.Tag.data_dependent_output in func.tags:
        what = "makes the host wait for a value"
    elif torch.Tag.dynamic_output_shape in func.tags:
        what = "has a shape that depends on values"
    elif torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
        what = "draws random numbers"
    elif len(devices := _devices(args, kwargs)) > 1:
        what = f"copies between {' and '.join(sorted(devices))}"
    if what is not None:
        raise CaptureFailed(
            f"The loop cannot be captured: {func} {what}. A replay would not repeat that. "
            "It runs eagerly; pass engine='eager' to leave it so."
        )


def _draws(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether it draws: attention and dropout are marked so even where nothing is dropped."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "p", "train"):
            value = kwargs.get(argument.name, args[index] if index < len(args) else argument.default_value)
            return bool(value)
    return True


def _devices(args: Any, kwargs: dict[str, Any]) -> set[str]:
    # a tensor of no dimensions on the CPU is a number: it goes along with the launch, and would be frozen
    devices = {tensor.device.type for tensor in tensors_in((args, kwargs))}
    device = kwargs.get("device")
    return devices | {torch.device(device).type} if device is not None and devices else devices


def tensors_in(found: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    return (leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))


def new_in(out: Any, given: Iterable[Tensor]) -> list[Tensor]:
    """The outputs of an operation that do not lie in the memory of what it was given."""
    storages = {storage_of(tensor) for tensor in given}
    return [tensor for tensor in tensors_in(out) if storage_of(tensor) not in storages]


def storage_of(tensor: Tensor) -> int:
    """Which memory a tensor lies in."""
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


def not_among(read: Iterable[Tensor], known: Iterable[Tensor]) -> list[Tensor]:
    """The tensors read whose memory belongs to none of the known ones."""
    storages = {storage_of(tensor) for tensor in known}
    return [tensor for tensor in read if storage_of(tensor) not in storages]
