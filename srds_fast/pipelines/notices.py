"""Warnings, or strict errors, where a call does not run the fastest way."""

from __future__ import annotations

import logging
import re
from typing import Any

from ..errors import CaptureFailed, UnsupportedPipeline
from ..planner.settings import GRAPH_ENGINES
from .state import State

logger = logging.getLogger("srds_fast")


def warn_once(state: State, kind: str, message: str) -> None:
    """Log a warning, unless this compiled pipeline has logged one of the same kind."""
    if kind not in state.notified:
        state.notified.add(kind)
        logger.warning(message)


def warn_fallback(fast: Any, how: str, reason: str) -> None:
    """Warn that calls do not run in parallel; with strict=True raise UnsupportedPipeline.

    Args:
        how: the way they run: "step by step" or "on its stock loop".
    """
    if fast._srds.strict:
        raise UnsupportedPipeline(
            f"This call cannot be accelerated: {reason}. strict=True forbids to run it {how}. "
            "Change what the reason names, or compile without strict."
        )
    kind = re.sub(r" at step \d+", "", reason)
    warn_once(fast._srds, kind, f"{type(fast).__name__} runs {how}: {reason}.")


def warn_left_out(fast: Any, reason: str) -> None:
    """Warn that a network option was not applied; with strict=True raise UnsupportedPipeline."""
    if fast._srds.strict:
        raise UnsupportedPipeline(
            f"The network cannot be made faster as asked: {reason}. strict=True forbids to leave it out. "
            "Change what the reason names, or compile without strict."
        )
    warn_once(fast._srds, reason, f"{type(fast).__name__}: {reason}.")


def warn_eager(fast: Any, reason: str) -> None:
    """Warn that calls run eagerly; with strict=True and a graph engine by name, raise CaptureFailed."""
    state = fast._srds
    if state.engine in GRAPH_ENGINES and state.strict:
        raise CaptureFailed(
            f"This call cannot be replayed: {reason}. strict=True forbids to run it eagerly. "
            "Change what the reason names, pass engine='auto', or compile without strict."
        )
    warn_once(state, reason, f"{type(fast).__name__} runs eagerly: {reason}.")
