"""A description of a pipeline's loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedPipeline
from ..planner.plan import Plan

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

    def check_turns(self, plan: Plan) -> None:
        """Refuse a plan with more turns than steps, if the loop indexes a list with one entry per step."""
        few_turns = plan.is_sequential or (plan.options.fits_turns and plan.max_rows is None)
        if self.counts and not few_turns:
            raise UnsupportedPipeline(
                "The pipeline's loop looks up its list of steps by turn, and this plan may take more turns than steps. "
                "Use method='srds' with pipelined=True, and neither in_flight nor max_rows."
            )
