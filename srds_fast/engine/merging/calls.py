"""The network calls of the rows of a wave, merged as far as there are rules."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..distributed import call as distributed
from ..distributed.call import SharedCall
from .rule import Call, MergeRule, same_call
from .search import Found, find_rule
from .units import Form, Piece, by_entries, device_of, entries_call


class MergedCalls:
    """Makes the network calls of the rows of a wave, merged as far as their kinds have rules.

    found: rules of earlier calls, by kind; it is extended.
    make: makes a network call.
    """

    def __init__(
        self, found: MutableMapping[Hashable, Found], make: Callable[[Call], Any] = lambda call: call()
    ) -> None:
        self._found, self._make = found, make
        self._forms: dict[Hashable, Form | None] = {}  # of kinds without a rule, as far as calls have shown
        self._reasons: dict[str, None] = {}
        self.too_wide: int | None = None  # fewest calls that did not fit into memory as one
        self.network_calls = 0  # all of them
        self.search_calls = 0  # those of them that looked for rules

    def __call__(self, calls: Sequence[Call]) -> list[Any]:
        """The outputs of calls at the same place in the turns of several rows, one for each call."""
        (found,) = self.together([calls])
        return found

    def together(self, groups: Sequence[Sequence[Call]]) -> list[list[Any]]:
        """The same for calls at several places, which need no answers of each other: ranks share all of them."""
        shared = distributed.current()
        if shared is None:
            return [self._by_kind(calls) for calls in groups]
        outputs = iter(self._by_ranks(shared, [call for calls in groups for call in calls]))
        return [[next(outputs) for _ in calls] for calls in groups]

    def _by_kind(self, calls: Sequence[Call]) -> list[Any]:
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
            outputs = [self.alone(each) for each in pair]
            found = find_rule(pair, outputs)
            self.network_calls += found.network_calls
            if distributed.current() is not None:
                divided = found.rule is not None and by_entries(found.rule, pair[1], outputs[1], self.alone)
                entries = found.rule.batch if found.rule is not None and divided else 1
                found = found._replace(form=Form.of(outputs[1], entries))
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

    def divides(self, kind: Hashable) -> bool:
        """Whether ranks share the entries of a call of this kind."""
        form = self._form(kind)
        return form is not None and form.entries > 1

    def _of_kind(self, kind: Hashable, calls: dict[int, Call]) -> dict[int, Any]:
        rule = self._rule(kind, list(calls.values()))
        outputs: dict[int, Any] = {}
        rest = list(calls)
        while rest:
            together = [rest[0], *(each for each in rest[1:] if rule and rule.may_merge(calls[rest[0]], calls[each]))]
            together = together[: self._most]
            if rule is None or len(together) == 1:
                outputs[rest[0]] = self.alone(calls[rest[0]])
            elif found := self._if_it_fits(partial(self._as_one, rule, [calls[number] for number in together])):
                outputs |= dict(zip(together, found, strict=True))
            else:
                self.too_wide = len(together)
            rest = [number for number in rest if number not in outputs]
        return outputs

    def _rule(self, kind: Hashable, calls: Sequence[Call]) -> MergeRule | None:
        """The rule of a kind, which calls of it show if it is not known."""
        if kind not in self._found and len(calls) > 1:
            # rows at the same point would tell nothing
            second = next((each for each in calls[1:] if not same_call(calls[0], each)), None)
            if second is not None:
                self.learn([(calls[0], second)])
        known = self._found.get(kind)
        if (known is None or known.rule is None) and len(calls) > 1:
            self.reasons([kind])
        return None if known is None else known.rule

    @property
    def _most(self) -> int | None:
        """How many calls may become one: half of those that did not fit, as each try costs a call."""
        return None if self.too_wide is None else max(1, self.too_wide // 2)

    def _as_one(self, rule: MergeRule, calls: Sequence[Call]) -> list[Any]:
        return rule.split(self.alone(rule.merge(calls)), len(calls))

    def _by_ranks(self, shared: SharedCall, calls: Sequence[Call]) -> list[Any]:
        """The outputs of calls, of which each rank makes a share. All ranks have them."""
        kinds: dict[Hashable, list[Call]] = {}
        for call in calls:
            kinds.setdefault(call.kind, []).append(call)
        if any(kind not in self._found and len(of_kind) > 1 for kind, of_kind in kinds.items()):
            with shared.attempt("look how calls are merged"):
                for kind, of_kind in kinds.items():
                    self._rule(kind, of_kind)
        outputs: list[Any] = []
        while rest := calls[len(outputs) :]:
            some = rest[: self._most]
            if len(some) == 1:
                outputs += self._shared_out(shared, some)
            elif found := self._if_it_fits(partial(self._shared_out, shared, some)):
                outputs += found
            else:
                self.too_wide = len(some)
        return outputs

    def _shared_out(self, shared: SharedCall, calls: Sequence[Call]) -> list[Any]:
        outputs: dict[int, Any] = {}
        pieces: list[Piece] = []
        for number, call in enumerate(calls):
            form = self._form(call.kind)
            if form is None:  # every rank makes it
                with shared.attempt("a network call of its own"):
                    outputs[number] = self.alone(call)
                self._forms.setdefault(call.kind, Form.of(outputs[number]))
            else:
                pieces += [Piece(call, entry, entry + 1) for entry in range(form.entries)]
        forms = {piece.call.kind: self._form(piece.call.kind) for piece in pieces}
        nbytes = max((form.nbytes for form in forms.values() if form is not None), default=0)
        units = iter(
            shared.units(len(pieces), nbytes, device_of(calls), lambda part: self._packed(pieces[part], nbytes))
            if pieces
            else ()
        )
        for number, call in enumerate(calls):
            if number not in outputs and (form := forms[call.kind]) is not None:
                outputs[number] = form.unpack([next(units) for _ in range(form.entries)])
        return [outputs[number] for number in range(len(calls))]

    def _packed(self, pieces: Sequence[Piece], nbytes: int) -> Tensor:
        """What some units give, in bytes, [units, nbytes]; in as few network calls as their rules allow."""
        room = torch.zeros(len(pieces), nbytes, dtype=torch.uint8, device=device_of(each.call for each in pieces))
        rest = list(range(len(pieces)))
        while rest:
            first = pieces[rest[0]].call
            known, form = self._found.get(first.kind), self._form(first.kind)
            assert form is not None
            rule = None if known is None else known.rule
            some = [rest[0]]
            if rule is not None:
                others = [number for number in rest[1:] if pieces[number].call.kind == first.kind]
                some += [number for number in others if rule.may_merge(first, pieces[number].call)]
            found = [pieces[number] for number in some]
            if rule is not None and form.entries > 1:
                own = torch.zeros_like(room[: len(some)])
                form.pack(self.alone(entries_call(rule, found)), own)
                room[some] = own
            else:
                calls = [each.call for each in found]
                outputs = [self.alone(first)] if rule is None or len(calls) == 1 else self._as_one(rule, calls)
                for number, output in zip(some, outputs, strict=True):
                    form.pack(output, room[number : number + 1])
            rest = [number for number in rest if number not in some]
        return room

    def _form(self, kind: Hashable) -> Form | None:
        known = self._found.get(kind)
        return self._forms.get(kind) if known is None or known.form is None else known.form

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
