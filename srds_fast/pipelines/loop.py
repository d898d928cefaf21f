"""What must be known of a pipeline's loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Loop:
    """What must be known of a pipeline's loop to drive it.

    Attributes:
        networks: names of the components that are called in the loop.
        copies: how many copies of the state the loop carries along (DiT carries two under guidance).
        joins: the loop may join conditioning to the states, channel by channel.
        blends: the loop puts the known part of an image back in after every step.
        counts: the loop looks up what it needs by its turn, in a list with an entry per step.
        checked: the loop was read by hand; otherwise what it tells its network is checked in the first turn.
    """

    networks: tuple[str, ...]
    copies: int = 1
    joins: bool = False
    blends: bool = False
    counts: bool = False
    checked: bool = True
