"""What earlier calls of a pipeline have found out about its loop, for later calls of their kinds."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..merging.search import Found
from ..network_checks import Checked
from .rehearsal import Facts

MOST_KEPT = 256
Value = TypeVar("Value")


class Recent(dict[Hashable, Value]):
    """A dictionary that drops its oldest entries."""

    def __setitem__(self, key: Hashable, value: Value) -> None:
        super().__setitem__(key, value)
        while len(self) > MOST_KEPT:
            self.pop(next(iter(self)), None)  # another thread may have been faster


@dataclass
class LoopMemory:
    """Facts of rehearsals, or why there are none, by kind of call; the others by kind of network call.

    outputs: what calls return. rules: how they are merged. checked: why their network is no function of its arguments.
    rehearsed: loops, by `KindOfLoop.loop`. compared: what rows gave beside turns, by `TakenOver.kind_of_check`.
    """

    facts: Recent[Facts | str] = field(default_factory=Recent)
    outputs: Recent[Any] = field(default_factory=Recent)
    rules: Recent[Found] = field(default_factory=Recent)
    checked: Recent[str | None] = field(default_factory=Recent)
    rehearsed: Recent[bool] = field(default_factory=Recent)
    compared: Recent[Checked] = field(default_factory=Recent)

    def clear(self) -> None:
        for each in vars(self).values():
            each.clear()
