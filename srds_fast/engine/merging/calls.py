"""The network calls of the rows of a wave, merged as far as there are rules."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from ..distributed import call as distributed
from .rule import Call, MergeRule, Way, flatten, same_call
from .search import Found, find_rule


class MergedCalls:
    """Makes the network calls of the rows of a wave, merged as far as their kinds have rules.

    found: rules of earlier calls, by kind; it is extended.
    make: makes a network call.
    """

    def __init__(
        self, found: MutableMapping[Hashable, Found], make: Callable[[Call], Any] = lambda call: call()
    ) -> None:
        self._found, self._make = found, make
        self._reasons: dict[str, None] = {}
        self.too_wide: int | None = None  # fewest calls that did not fit into memory as one
        self.network_calls = 0  # all of them
        self.search_calls = 0  # those of them that looked for rules

    def __call__(self, calls: Sequence[Call]) -> list[Any]:
        """The outputs of calls at the same place in the turns of several rows, one for each call."""
        outputs: dict[int, Any] = {}
        by_kind: dict[Hashable, list[int]] = {}
        for number, call in enumerate(calls):
            by_kind.setdefault(call.kind, []).append(number)
        for kind, numbers in by_kind.items():
            outputs |= self._of_kind(kind, {number: calls[number] for number in numbers})
        return [outputs[number] for number in range(len(calls))]

    def learn(self, pairs: Sequence[tuple[Call, Call]]) -> None:
        """Find the rule of a kind, from calls of rows at different points; the first pair that gives one counts."""
        before = self.network_calls
        for pair in pairs:
            found = find_rule(pair, [self.alone(each) for each in pair])
            self.network_calls += found.network_calls
            self._found[pair[0].kind] = found
            if found.rule is not None:
                break
        self.search_calls += self.network_calls - before

    def reasons(self, kinds: Iterable[Hashable] = ()) -> list[str]:
        """Why some calls are made row by row, as clauses: those of these kinds, and those that were made."""
        for kind in kinds:
            known = self._found.get(kind)
            if known is not None and known.reason is not None:
                self._reasons[known.reason] = None
        return list(self._reasons)

    def _of_kind(self, kind: Hashable, calls: dict[int, Call]) -> dict[int, Any]:
        if kind not in self._found and len(calls) > 1:
            first, *others = calls
            # rows at the same point would tell nothing
            second = next((each for each in others if not same_call(calls[first], calls[each])), None)
            if second is not None:
                self.learn([(calls[first], calls[second])])
        known = self._found.get(kind)
        rule = None if known is None else known.rule
        if rule is None and len(calls) > 1:
            self.reasons([kind])
        outputs: dict[int, Any] = {}
        rest = list(calls)
        while rest:
            together = [rest[0], *(each for each in rest[1:] if rule and rule.may_merge(calls[rest[0]], calls[each]))]
            together = together[: self._most]
            if rule is None or len(together) == 1:
                outputs[rest[0]] = self.alone(calls[rest[0]])
            elif found := self._if_it_fits(partial(self._together, rule, [calls[number] for number in together])):
                outputs |= dict(zip(together, found, strict=True))
            else:
                self.too_wide = len(together)
            rest = [number for number in rest if number not in outputs]
        return outputs

    @property
    def _most(self) -> int | None:
        """How many calls may become one: half of those that did not fit, as each try costs a call."""
        return None if self.too_wide is None else max(1, self.too_wide // 2)

    def _together(self, rule: MergeRule, calls: Sequence[Call]) -> list[Any]:
        """The outputs of calls that are made as one, or as one by each rank."""
        shared = distributed.current()
        if shared is None or len(calls) < shared.ranks.size or not rule.gives_one_tensor:
            return rule.split(self.alone(rule.merge(calls)), len(calls))
        own: list[Any] = []

        def run(_: int, part: slice) -> Tensor:
            some = calls[part]
            found = [self.alone(some[0])] if len(some) == 1 else rule.split(self.alone(rule.merge(some)), len(some))
            own.extend(found)
            return torch.stack([flatten(each)[0][rule.splits.index(Way.JOIN)] for each in found])

        (joined,) = shared.outputs([len(calls)], (), torch.device("cpu"), run)
        leaves, spec = flatten(own[0])
        place = rule.splits.index(Way.JOIN)
        return [tree_unflatten([*leaves[:place], each, *leaves[place + 1 :]], spec) for each in joined]

    def _if_it_fits(self, make: Callable[[], list[Any]]) -> list[Any]:
        """What is made, or an empty list if there is no memory for it."""
        try:
            return make()
        except torch.OutOfMemoryError:  # what comes next is not done here: the error keeps the memory of the call alive
            return []

    def alone(self, call: Call) -> Any:
        """Make one call."""
        self.network_calls += 1
        return self._make(call)
