"""How network calls of one kind are merged: which arguments are joined, which are shared, how the output is split."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass(eq=False)
class Call:
    """A network call as a pipeline's loop makes it. Nothing changes it."""

    network: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, network: Callable[..., Any] | None = None) -> Any:
        """Make the call. network: called in the place of its own."""
        # a UNet takes the features of an adapter out of the list that it is given
        given = {name: _copied(value) for name, value in self.kwargs.items()}
        return (network or self.network)(*map(_copied, self.args), **given)

    @cached_property
    def flat(self) -> tuple[list[Any], TreeSpec]:
        """The leaves of its arguments, see `flatten`: to find them takes longer than most of what is done with them."""
        return flatten((self.args, self.kwargs))

    @cached_property
    def kind(self) -> Hashable:
        """What a rule is valid for: the network, names, shapes and dtypes of the arguments, and what is no number."""
        leaves, spec = self.flat
        # bound methods are made anew each time they are looked up
        owner = weakref.ref(getattr(self.network, "__self__", self.network))
        return owner, spec, tuple(map(_kind_of_leaf, leaves))

    def tensors(self) -> Iterator[Tensor]:
        """The tensors among its arguments."""
        for leaf in self.flat[0]:
            yield from leaf if is_list(leaf) else [leaf] if isinstance(leaf, Tensor) else ()


def _copied(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict) else value


class Way(Enum):
    """What becomes of one argument, or of one part of the output."""

    JOIN = 0  # along dimension 0
    JOIN_1 = 1  # along dimension 1
    SHARE = 2  # the same for all rows
    EXPAND = 3  # one number a row, repeated for the batch of the row
    ENTRIES = 4  # lists of tensors, put one behind the other


class Layout(Enum):
    """The order of the entries of a merged batch: by row, or by entry of a row's own batch (branches stay together)."""

    ROWS_FIRST = "rows first"
    BRANCHES_FIRST = "branches first"


@dataclass(frozen=True)
class MergeRule:
    """How calls of one kind are merged."""

    ways: tuple[Way, ...]  # of each leaf of the arguments
    layout: Layout
    batch: int  # entries of one row's own call
    splits: tuple[Way, ...] = ()  # of each leaf of the output

    def merge(self, calls: Sequence[Call]) -> Call:
        """One call for calls that `may_merge`."""
        flat = [call.flat[0] for call in calls]
        spec = calls[0].flat[1]
        device = _device_of(flat[0])
        flat = [
            [
                torch.tensor(leaf, device=device) if _is_number(way, leaf) else leaf
                for way, leaf in zip(self.ways, row, strict=True)
            ]
            for row in flat
        ]
        leaves = [self._joined(way, parts) for way, parts in zip(self.ways, zip(*flat, strict=True), strict=True)]
        return call_of(calls[0].network, leaves, spec)

    def may_merge(self, one: Call, other: Call) -> bool:
        """Whether everything that two calls of the kind would share is the same."""
        pairs = zip(one.flat[0], other.flat[0], strict=True)
        return all(same(*pair) for way, pair in zip(self.ways, pairs, strict=True) if way is Way.SHARE)

    def split(self, output: Any, count: int) -> list[Any]:
        """The outputs of `count` calls, from the output of their merged call."""
        leaves, spec = flatten(output)
        parts = [self.parts(way, leaf, count) for way, leaf in zip(self.splits, leaves, strict=True)]
        return [tree_unflatten(list(each), spec) for each in zip(*parts, strict=True)]

    def _joined(self, way: Way, parts: Sequence[Any]) -> Any:
        first = parts[0]
        if way is Way.SHARE:
            return first
        if way is Way.ENTRIES:
            return list(itertools.chain(*parts))
        if isinstance(first, list):
            return [self._joined(way, each) for each in zip(*parts, strict=True)]
        if way is Way.EXPAND:
            parts = [each.reshape(1).expand(self.batch) for each in parts]
        dim = 1 if way is Way.JOIN_1 else 0
        if self.layout is Layout.ROWS_FIRST or parts[0].shape[dim] % self.batch:
            return torch.cat(list(parts), dim)
        unflattened = [each.unflatten(dim, (self.batch, -1)) for each in parts]
        return torch.stack(unflattened, dim + 1).flatten(dim, dim + 2)

    def parts(self, way: Way, leaf: Any, count: int) -> list[Any]:
        """The parts of one leaf of a merged output, one for each of `count` calls."""
        if way is Way.SHARE:
            return [leaf] * count
        if way is Way.ENTRIES:
            size = len(leaf) // count
            return [leaf[row * size : (row + 1) * size] for row in range(count)]
        if isinstance(leaf, list):
            each_of = [self.parts(way, each, count) for each in leaf]
            return [list(row) for row in zip(*each_of, strict=True)]
        dim = 1 if way is Way.JOIN_1 else 0
        if self.layout is Layout.ROWS_FIRST or leaf.shape[dim] // count % self.batch:
            return list(leaf.chunk(count, dim))
        by_entry = leaf.unflatten(dim, (self.batch, count, -1))
        return [by_entry.select(dim + 1, row).flatten(dim, dim + 1) for row in range(count)]


def flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """The leaves of arguments or outputs; a list of tensors is one leaf."""
    return tree_flatten(tree, is_leaf=is_list)


def is_list(leaf: Any) -> bool:
    return isinstance(leaf, list) and bool(leaf) and all(isinstance(each, Tensor) for each in leaf)


def call_of(network: Callable[..., Any], leaves: list[Any], spec: TreeSpec) -> Call:
    args, kwargs = tree_unflatten(leaves, spec)
    return Call(network, args, kwargs)


def _device_of(leaves: Iterable[Any]) -> torch.device | None:
    """The device of the first tensor that is no single number: these may be left on the host."""
    tensors = itertools.chain.from_iterable(leaf if is_list(leaf) else [leaf] for leaf in leaves)
    return next((each.device for each in tensors if isinstance(each, Tensor) and each.ndim), None)


def _is_number(way: Way, leaf: Any) -> bool:
    return way is Way.EXPAND and not isinstance(leaf, Tensor)


def _kind_of_leaf(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    if is_list(leaf):
        return tuple(map(_kind_of_leaf, leaf))
    if isinstance(leaf, bool | str | None | torch.dtype):
        return leaf
    return type(leaf).__name__ if isinstance(leaf, int | float) else id(leaf)


def same(one: Any, other: Any) -> bool:
    """Whether two arguments hold the same; a NaN is the same as another one, as a state that diverged is itself."""
    if one is other:
        return True
    if is_list(one):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or one.shape != other.shape:
            return False
        return torch.equal(one, other) or (one.dtype is other.dtype and _same_but_nan(one, other))
    return type(one) is type(other) and bool(one == other or (one != one and other != other))


def _same_but_nan(one: Tensor, other: Tensor) -> bool:
    """Whether tensors that are not equal are so but for NaN at the same places."""
    if not one.is_floating_point() and not one.is_complex():
        return False
    return bool(one.isnan().any()) and bool(((one == other) | (one.isnan() & other.isnan())).all())


def same_call(one: Call, other: Call) -> bool:
    return all(map(same, one.flat[0], other.flat[0]))
