"""A description of a pipeline's loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Loop:
    """A description of a pipeline's loop.

    Attributes:
        networks: names of the components that the loop calls.
        copies: number of copies of the state in the loop (DiT has two under guidance).
        joins: the loop may concatenate conditioning to the states along the channels.
        blends: the loop pastes the known part of an image back after every step (inpainting).
        counts: the loop indexes a list that has one entry per step with its turn number.
        checked: the loop was read by hand; otherwise the first turn checks the timestep that it gives the network.
    """

    networks: tuple[str, ...]
    copies: int = 1
    joins: bool = False
    blends: bool = False
    counts: bool = False
    checked: bool = True
