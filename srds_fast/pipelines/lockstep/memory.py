"""What earlier calls of a pipeline have found out about its loop, for later calls of their kinds."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ...caches import Cache
from ..merging.search import Found
from ..network_checks import Checked
from .rehearsal import Facts


@dataclass
class LoopMemory:
    """Facts of rehearsals, or why there are none, by kind of call; the others by kind of network call.

    outputs: what calls return. rules: how they are merged. checked: why their network is no function of its arguments.
    rehearsed: loops, by `KindOfLoop.loop`. compared: what rows gave beside turns, by `TakenOver.kind_of_check`.
    """

    facts: Cache[Facts | str] = field(default_factory=partial(Cache, "loops: facts"))
    outputs: Cache[Any] = field(default_factory=partial(Cache, "loops: outputs"))
    rules: Cache[Found] = field(default_factory=partial(Cache, "loops: rules"))
    checked: Cache[str | None] = field(default_factory=partial(Cache, "loops: checked"))
    rehearsed: Cache[bool] = field(default_factory=partial(Cache, "loops: rehearsed"))
    compared: Cache[Checked] = field(default_factory=partial(Cache, "loops: compared"))

    def clear(self) -> None:
        for each in vars(self).values():
            each.clear()
