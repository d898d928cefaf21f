"""Finds the merge rule of a kind of network call by trying.

A merged call must give each row what a call of its own gives, also if the other row and its conditioning are something
else. So no network needs to be known by name, and a network whose answer for a row depends on the other rows of its
call has no rule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import cancellation
from .rounding import distance
from .rule import Call, Layout, MergeRule, Way, call_of, flatten, is_list, same
from .units import Form

# how far a call of equal rows may be from a call of one, and other rows from what equal ones showed, in such units
SAME_ROWS, SEVERAL_TIMES = 30.0, 5.0
MOST_TRIES = 32


class Found(NamedTuple):
    """The rule of a kind of call, or why it has none.

    form: of its output; None: no ranks share such calls.
    """

    rule: MergeRule | None
    reason: str | None  # a clause
    network_calls: int  # that the search made
    form: Form | None = None


def find_rule(calls: Sequence[Call], alone: Sequence[Any]) -> Found:
    """The rule of a kind of call.

    Args:
        calls: two calls of the kind, of rows at different points.
        alone: what each of them returned. They are called again here, merged, and with other conditioning.
    """
    search = _Search(calls, alone)
    return Found(search.rule(), search.reason, search.network_calls)


class _Search:
    """The search for the rule of a kind of call, of which two calls and their outputs are known."""

    def __init__(self, calls: Sequence[Call], alone: Sequence[Any]) -> None:
        self.calls, self.alone = calls, [flatten(each)[0] for each in alone]
        self.spec = flatten(alone[0])[1]
        self.flat = [call.flat[0] for call in calls]
        self.network_calls = 0
        self.reason: str | None = None
        self.batch = self._batch()

    def rule(self) -> MergeRule | None:
        if not self.batch:
            self.reason = "no argument of it holds the state of a row"
            return None
        self.reason = "its arguments cannot be joined"
        for rule in itertools.islice(self._candidates(), MOST_TRIES):
            try:
                found = self._tried(rule)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError):
                continue  # the network does not take such arguments
            if found is not None:
                self.reason = None
                return found
        return None

    def _batch(self) -> int:
        """Entries in the call of one row: as many as the first argument has that holds its state."""
        for one, other in zip(*self.flat, strict=True):
            if is_list(one) and not same(one, other):
                return len(one)
            if isinstance(one, Tensor) and one.ndim > 1 and one.is_floating_point() and not same(one, other):
                return len(one)
        return 0

    def _candidates(self) -> Iterator[MergeRule]:
        """Rules, the likely ones first: by the shapes, then with one, two, ... arguments treated in another way."""
        choices = [self._ways(one, other) for one, other in zip(*self.flat, strict=True)]
        layouts = list(Layout) if self.batch > 1 else [Layout.ROWS_FIRST]
        likely = tuple(ways[0] for ways in choices)
        yield from (MergeRule(likely, layout, self.batch) for layout in layouts)
        open_ones = [number for number, ways in enumerate(choices) if len(ways) > 1]
        # arguments of the same length are mostly treated alike
        alike: dict[Hashable, list[int]] = {}
        for number in open_ones:
            alike.setdefault(tuple(choices[number]), []).append(number)
        groups = [group for group in alike.values() if len(group) > 1] + [[number] for number in open_ones]
        for count in range(1, len(groups) + 1):
            for chosen in itertools.combinations(groups, count):
                numbers = {number for group in chosen for number in group}
                for ways in itertools.product(
                    *(choices[n][1:] if n in numbers else [likely[n]] for n in range(len(choices)))
                ):
                    yield from (MergeRule(tuple(ways), layout, self.batch) for layout in layouts)

    def _ways(self, one: Any, other: Any) -> list[Way]:
        """What may become of an argument, the likely first."""
        differs, batch = not same(one, other), self.batch
        if is_list(one):
            entries = [Way.ENTRIES] if len(one) % batch == 0 else []
            each = self._ways(one[0], other[0])
            ways = [*entries, *each] if len(one) == batch else [*each, *entries]
            return [way for way in ways if way is not Way.SHARE] if differs else ways
        if isinstance(one, bool) or not isinstance(one, Tensor | float | int):
            return [Way.SHARE]
        if not isinstance(one, Tensor):
            return [Way.EXPAND] if differs else [Way.SHARE]
        if differs and one.numel() == 1:
            return [Way.EXPAND, *[Way.JOIN] * one.ndim]
        if one.ndim == 0:
            return [Way.SHARE, Way.EXPAND]
        joins = [Way.JOIN]
        if one.ndim > 1 and one.shape[1] == batch:
            joins = [Way.JOIN, Way.JOIN_1] if len(one) == batch else [Way.JOIN_1, Way.JOIN]
        if differs:
            return joins
        return [*joins, Way.SHARE] if joins[0] is Way.JOIN_1 or len(one) == batch else [Way.SHARE, *joins]

    def _tried(self, rule: MergeRule) -> MergeRule | None:
        """The rule with its splits, if merged calls give what single ones do."""
        first, second = self.calls
        if not rule.may_merge(first, second):
            return None
        merged = self._outputs(rule.merge((first, first)))
        splits = tuple(map(split_of, self.alone[0], merged))
        if None in splits:
            return None
        rule = MergeRule(rule.ways, rule.layout, rule.batch, splits)  # type: ignore[arg-type]
        rounding = self._difference(rule, merged, (self.alone[0], self.alone[0]))
        if rounding > SAME_ROWS:
            return None
        bound = max(1.0, SEVERAL_TIMES * rounding)
        leaks = "its output for a row depends on the other rows of the call"
        if self._difference(rule, self._outputs(rule.merge(self.calls)), self.alone) > bound:
            self.reason = leaks
            return None
        other = perturbed(rule, second, list(map(same, *self.flat)))
        alone = self._outputs(other)
        if self._difference(rule, self._outputs(rule.merge((first, other))), (self.alone[0], alone)) > bound:
            self.reason = leaks
            return None
        return rule

    def _outputs(self, call: Call) -> list[Any]:
        self.network_calls += 1
        cancellation.wave(1)
        leaves, _ = flatten(call())
        if len(leaves) != len(self.alone[0]):
            raise ValueError("the merged call returned something else")
        return leaves

    def _difference(self, rule: MergeRule, merged: list[Any], alone: Sequence[list[Any]]) -> float:
        """The largest relative difference of an entry of a row's output, in units of rounding."""
        rows = zip(*(rule.parts(way, leaf, 2) for way, leaf in zip(rule.splits, merged, strict=True)), strict=True)
        return max(
            (
                distance(found, expected)
                for row, own in zip(rows, alone, strict=True)
                for found, expected in zip(row, own, strict=True)
            ),
            default=0.0,
        )


def split_of(alone: Any, merged: Any) -> Way | None:
    """What a part of the output of a merged call of two rows is made of; None: it is not known."""
    if is_list(alone):
        if len(merged) == 2 * len(alone):
            return Way.ENTRIES
        ways = {split_of(*pair) for pair in zip(alone, merged, strict=True)}
        return ways.pop() if len(ways) == 1 else None
    if not isinstance(alone, Tensor):
        return Way.SHARE if same(alone, merged) else None
    if alone.ndim and merged.shape == (2 * len(alone), *alone.shape[1:]):
        return Way.JOIN
    if alone.ndim > 1 and merged.shape == (len(alone), 2 * alone.shape[1], *alone.shape[2:]):
        return Way.JOIN_1
    return Way.SHARE if same(alone, merged) else None


def perturbed(rule: MergeRule, call: Call, same: list[bool]) -> Call:
    """The call with another state and other conditioning: everything that is joined, except for times and masks."""
    leaves, spec = call.flat
    draw = torch.Generator().manual_seed(0)

    def other(value: Tensor, equal: bool) -> Tensor:
        if not value.is_floating_point() or value.ndim < 2 or value.numel() < 2:
            return value
        size = float(value.float().std())
        if not math.isfinite(size) or size == 0:
            return value
        noise = torch.randn(value.shape, generator=draw, dtype=torch.float32, device="cpu").to(
            value.device, value.dtype
        )
        return value + size * noise if equal else 3 * value

    def changed(way: Way, leaf: Any, equal: bool) -> Any:
        if way is Way.SHARE:
            return leaf
        if is_list(leaf):
            return [other(each, equal) for each in leaf]
        return other(leaf, equal) if isinstance(leaf, Tensor) else leaf

    return call_of(call.network, [changed(*each) for each in zip(rule.ways, leaves, same, strict=True)], spec)
