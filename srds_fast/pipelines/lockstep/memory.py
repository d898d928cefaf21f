"""What earlier calls of a pipeline have found out about its loop, for later calls of their kinds."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from ...caches import Cache
from ...engine.merging.search import Found
from ..module_state import ModuleState
from ..network_checks import Checked
from .rehearsal import Facts


@dataclass
class LoopMemory:
    """Facts of rehearsals, or why there are none, by kind of call; the others by kind of network call.

    outputs: what calls return. rules: how they are merged. checked: why their network is no function of its arguments.
    rehearsed: loops, by `KindOfLoop.loop`. compared: what rows gave beside turns, by `taken_over.kind_of_check`.
    """

    facts: Cache[Facts | str] = field(default_factory=partial(Cache, "loops: facts"))
    outputs: Cache[Any] = field(default_factory=partial(Cache, "loops: outputs"))
    rules: Cache[Found] = field(default_factory=partial(Cache, "loops: rules"))
    checked: Cache[str | None] = field(default_factory=partial(Cache, "loops: checked"))
    rehearsed: Cache[bool] = field(default_factory=partial(Cache, "loops: rehearsed"))
    compared: Cache[Checked] = field(default_factory=partial(Cache, "loops: compared"))
    # what the networks of the last call held, behind weak references to them
    held: list[tuple[list[weakref.ref[nn.Module]], ModuleState]] = field(default_factory=list)

    def held_by(self, networks: Sequence[nn.Module]) -> ModuleState:
        """What networks hold now. It is looked at anew only where they hold something else than in the last call."""
        for alive, known in self.held:
            same = len(alive) == len(networks) and all(one() is each for one, each in zip(alive, networks, strict=True))
            if same and known.is_as_new():
                return known
        found = ModuleState(networks)
        self.held = [([weakref.ref(each, self._drop) for each in networks], found)]
        return found

    def _drop(self, _network: Any) -> None:
        """A network is gone: its weights are not kept."""
        self.held.clear()

    def clear(self) -> None:
        for each in vars(self).values():
            each.clear()
