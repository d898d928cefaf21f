"""Digests: whether two turns did the same, to the bit, without keeping what they did."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .turns import Ran

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR = 0x5851F42D4C957F2D  # of a linear congruential generator: odd, so no bit of a product is lost
_PLAIN = (bool, int, float, str, type(None))


class Digests:
    """Makes digests; tensors that come again and have not been written into are looked at once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def of(self, ran: Ran) -> tuple[Hashable, ...]:
        """One entry for each network call of a turn, and one for its guided output."""
        trees = [*((call.args, call.kwargs) for call in ran.calls), ran.m]
        leaves = [tree_leaves(tree) for tree in trees]
        tensors = [leaf for each in leaves for leaf in each if isinstance(leaf, Tensor)]
        numbers = iter(torch.stack([self._of_tensor(each) for each in tensors]).tolist())  # one wait for the device
        kinds = [*ran.kinds, (ran.m.shape, ran.m.dtype)]

        def of_leaf(leaf: Any) -> Hashable:
            return next(numbers) if isinstance(leaf, Tensor) else leaf if isinstance(leaf, _PLAIN) else None

        return tuple((kind, *map(of_leaf, each)) for kind, each in zip(kinds, leaves, strict=True))

    def _of_tensor(self, tensor: Tensor) -> Tensor:
        if tensor.is_inference():
            return digest(tensor)
        found = self._known.get(id(tensor))
        if found is None or found[0]() is not tensor or found[1] != tensor._version:
            found = self._known[id(tensor)] = weakref.ref(tensor), tensor._version, digest(tensor)
        return found[2]


def digest(tensor: Tensor) -> Tensor:
    """An integer that depends on every bit of a tensor and on where it is."""
    flat = torch.view_as_real(tensor).flatten() if tensor.is_complex() else tensor.flatten()
    if flat.dtype == torch.bool:
        flat = flat.to(torch.int8)
    bits = flat.view(_INTEGERS[flat.element_size()]).to(torch.int64)
    places = torch.arange(1, 2 * bits.numel(), 2, device=bits.device)
    found: Tensor = ((bits + places) * (places * _FACTOR)).sum()
    return found
