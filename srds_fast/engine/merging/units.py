"""Network calls in units that several ranks share: whole calls, or the entries of their batches one by one.

What ranks send each other are bytes: all tensors of an output, whatever their shapes and dtypes, one behind the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ...errors import InvalidArgument
from .rounding import distance
from .rule import Call, MergeRule, Way, call_of, is_list

# bytes; a tensor begins at a multiple of it
ALIGNED = 16
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Form:
    """What the calls of a kind return, but for the numbers in tensors.

    leaves: a tensor on the meta device for each tensor. entries: of the batch, by which each tensor can be cut; 1: the
    output is one piece. nbytes: of a unit, an entry or the whole.
    """

    leaves: tuple[Any, ...]
    spec: TreeSpec
    entries: int = 1

    @classmethod
    def of(cls, output: Any, entries: int = 1) -> Form | None:
        """That of an output; None: it holds something else than tensors and plain values."""
        leaves, spec = tree_flatten(output)
        if not all(isinstance(each, _PLAIN) or (_is_tensor(each) and not each.is_complex()) for each in leaves):
            return None
        return cls(
            tuple(torch.empty_like(each, device="meta") if _is_tensor(each) else each for each in leaves), spec, entries
        )

    @property
    def nbytes(self) -> int:
        return sum(aligned(each.nbytes // self.entries) for each in self.leaves if _is_tensor(each))

    def pack(self, output: Any, room: Tensor) -> None:
        """Write an output into room, bytes [units, at least nbytes]. It may be that of fewer or more entries.

        InvalidArgument: it has another form.
        """
        leaves, offset = tree_flatten(output)[0], 0
        if len(leaves) != len(self.leaves) or not all(map(partial(self._fits, len(room)), leaves, self.leaves)):
            raise InvalidArgument(
                "A network returned something else than in an earlier call of the same kind: another number of "
                "tensors, or one of another shape or dtype. Ranks share calls whose outputs are alike. Look at hooks "
                "on it."
            )
        for leaf in filter(_is_tensor, leaves):
            coded = leaf.detach().reshape(len(room), -1).contiguous().view(torch.uint8)
            room[:, offset : offset + coded.shape[1]] = coded
            offset += aligned(coded.shape[1])

    def _fits(self, units: int, leaf: Any, like: Any) -> bool:
        if not (_is_tensor(leaf) and _is_tensor(like)):
            return type(leaf) is type(like)
        shape = like.shape if self.entries == 1 else (units, *like.shape[1:])
        return leaf.shape == shape and leaf.dtype is like.dtype

    def unpack(self, units: Sequence[Tensor]) -> Any:
        """An output, from its units: bytes, [at least nbytes] each."""
        found, offset = list[Any](), 0
        for leaf in self.leaves:
            if not _is_tensor(leaf):
                found.append(leaf)
                continue
            size = leaf.nbytes // self.entries
            parts = [unit[offset : offset + size].view(leaf.dtype) for unit in units]
            found.append((parts[0] if len(parts) == 1 else torch.cat(parts)).view(leaf.shape))
            offset += aligned(size)
        return tree_unflatten(found, self.spec)


class Piece(NamedTuple):
    """Entries of the batch of a call."""

    call: Call
    begin: int
    end: int


def entries_call(rule: MergeRule, pieces: Sequence[Piece]) -> Call:
    """One call for some entries of calls that `may_merge`."""
    leaves = [
        _cut(way, [(piece.call.flat[0][number], piece) for piece in pieces], rule.batch)
        for number, way in enumerate(rule.ways)
    ]
    first = pieces[0].call
    return call_of(first.network, leaves, first.flat[1])


def by_entries(rule: MergeRule, call: Call, output: Any, made: Any) -> bool:
    """Whether the entries of a call are independent of each other, as far as calls of the first and the last show.

    output: of the call. made: makes a call.
    """
    form = Form.of(output, rule.batch)
    whole = tree_flatten(output)[0]
    joined = all(way in (Way.JOIN, Way.SHARE) for way in rule.splits)
    if form is None or rule.batch < 2 or not joined:
        return False
    if any(not each.ndim or len(each) != rule.batch for each in whole if _is_tensor(each)):
        return False
    for entry in (0, rule.batch - 1):
        try:
            found = tree_flatten(made(entries_call(rule, [Piece(call, entry, entry + 1)])))[0]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError):
            return False  # the network does not take such arguments
        expected = [each[entry : entry + 1] if _is_tensor(each) else each for each in whole]
        if len(found) != len(expected) or any(map(_apart, found, expected)):
            return False
    return True


def aligned(nbytes: int) -> int:
    return math.ceil(nbytes / ALIGNED) * ALIGNED


def device_of(calls: Iterable[Call]) -> torch.device:
    """Where the network calls are made: the device of their first tensor that is no single number."""
    tensors = itertools.chain.from_iterable(call.tensors() for call in calls)
    return next((each.device for each in tensors if each.ndim), torch.device("cpu"))


def _apart(found: Any, expected: Any) -> bool:
    if not (_is_tensor(found) and _is_tensor(expected)):
        return bool(found != expected)
    return found.shape != expected.shape or found.dtype is not expected.dtype or distance(found, expected) > 1


def _cut(way: Way, parts: Sequence[tuple[Any, Piece]], batch: int) -> Any:
    """The entries of an argument that belong to pieces of calls. parts: the argument of each, with the piece."""
    first, _ = parts[0]
    if way is Way.SHARE:
        return first
    if way is Way.ENTRIES:
        each = len(first) // batch
        return [value for leaf, piece in parts for value in leaf[each * piece.begin : each * piece.end]]
    if is_list(first):
        return [_cut(way, [(leaf[number], piece) for leaf, piece in parts], batch) for number in range(len(first))]
    if way is Way.EXPAND:
        device = device_of(piece.call for _, piece in parts)
        numbers = [
            leaf.reshape(1) if isinstance(leaf, Tensor) else torch.tensor([leaf], device=device) for leaf, _ in parts
        ]
        return torch.cat(
            [number.expand(piece.end - piece.begin) for number, (_, piece) in zip(numbers, parts, strict=True)]
        )
    dim = 1 if way is Way.JOIN_1 else 0
    if first.shape[dim] % batch:
        raise ValueError("an argument has no entries")
    each = first.shape[dim] // batch
    return torch.cat(
        [leaf.narrow(dim, each * piece.begin, each * (piece.end - piece.begin)) for leaf, piece in parts], dim
    )


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)
