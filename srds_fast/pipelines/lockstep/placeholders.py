"""Placeholders: random numbers in the place of the output of a network call that has not been made yet.

What a kind of call returns, as a structure of tensors of some shapes, is learnt from one real call of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from ...engine.merging.rule import Call


class Placeholders:
    """Makes placeholders. known: outputs of earlier calls by kind, of which the structure counts; it is extended."""

    def __init__(self, known: MutableMapping[Hashable, Any], make: Callable[[Call], Any]) -> None:
        self._known, self._make = known, make
        self._drawn: dict[Hashable, tuple[list[Any], TreeSpec]] = {}
        self.network_calls = 0  # that were made to learn what a kind of call returns

    def learn(self, call: Call, output: Any) -> None:
        """Remember what a call returned, unless its kind is known."""
        kind = call.kind
        if kind not in self._known:
            self._known[kind] = tree_map_only(Tensor, _shape_only, output)

    def of(self, call: Call, number: int, *, changed: bool = False) -> Any:
        """The placeholder for the call with a number in its turn: always the same numbers, or `changed` ones."""
        leaves, structure = self._of(call, number, changed)
        # the loop may write into it
        return tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)

    def leaves_of(self, call: Call, number: int, *, changed: bool = False) -> list[Any]:
        """The leaves of the placeholder, only to be read."""
        return self._of(call, number, changed)[0]

    def _of(self, call: Call, number: int, changed: bool) -> tuple[list[Any], TreeSpec]:
        kind = call.kind
        if kind not in self._known:
            self.network_calls += 1
            self.learn(call, self._make(call))
        key = kind, number, changed
        if key not in self._drawn:
            self._drawn[key] = tree_flatten(self._draw(kind, 2 * number + changed))
        return self._drawn[key]

    def _draw(self, kind: Hashable, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)

        def numbers(shape: Tensor) -> Tensor:
            drawn = torch.randn(shape.shape, generator=generator, dtype=torch.float32, device="cpu")
            return drawn.to(device=shape.device, dtype=shape.dtype)

        return tree_map_only(Tensor, numbers, self._known[kind])


def _shape_only(tensor: Tensor) -> Tensor:
    """A tensor of this shape, dtype and device that takes no memory."""
    return tensor.new_empty(()).expand(tensor.shape)
