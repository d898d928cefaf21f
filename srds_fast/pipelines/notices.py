"""Log lines and strict errors where a call does not run the fastest way."""

from __future__ import annotations

import logging
import re
from typing import Any

from ..engine.streams import has_two_lanes
from ..errors import CaptureFailed, UnsupportedPipeline
from ..planner.settings import GRAPH_ENGINES
from ..solvers.program import Program

logger = logging.getLogger("srds_fast")


def _fallback(fast: Any, how: str, reason: str) -> None:
    """Say once that and why calls are not driven in parallel; with strict=True raise it."""
    state = fast._srds
    if state.strict:
        raise UnsupportedPipeline(
            f"This call cannot be accelerated: {reason}. strict=True forbids to run it {how}. "
            "Change what the reason names, or compile without strict."
        )
    kind = re.sub(r" at step \d+", "", reason)
    if kind not in state.told:
        state.told.add(kind)
        logger.warning("%s runs %s: %s.", type(fast).__name__, how, reason)


def _left_out(fast: Any, reason: str) -> None:
    """Say once what was asked of the networks and cannot be had; with strict=True raise it."""
    state = fast._srds
    if state.strict:
        raise UnsupportedPipeline(
            f"The network cannot be made faster as asked: {reason}. strict=True forbids to leave it out. "
            "Change what the reason names, or compile without strict."
        )
    if reason not in state.told:
        state.told.add(reason)
        logger.warning("%s: %s.", type(fast).__name__, reason)


def _tell_of_overlap(fast: Any, program: Program) -> None:
    report = fast._srds.last.report
    if fast._srds.overlap == "streams" and report.overlap == "batch" and has_two_lanes(program):
        how = "a graph of a wave's width holds one batch" if report.path == "takeover" else "the loop is driven"
        report.left_out.append(f"overlap='streams' was left out: {how}")


def _eagerly(fast: Any, reason: str) -> None:
    """Say once that and why calls are not replayed; where graphs were asked for by name, strict=True raises it."""
    state = fast._srds
    if state.engine in GRAPH_ENGINES and state.strict:
        raise CaptureFailed(
            f"This call cannot be replayed: {reason}. strict=True forbids to run it eagerly. "
            "Change what the reason names, pass engine='auto', or compile without strict."
        )
    if reason not in state.told:
        state.told.add(reason)
        logger.warning("%s runs eagerly: %s.", type(fast).__name__, reason)
