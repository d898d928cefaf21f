"""Warnings, or strict errors, where a call does not run the fastest way; and what diffusers logs meanwhile."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import CaptureFailed, SrdsFastError, UnsupportedPipeline
from ..planner.settings import GRAPH_ENGINES

logger = logging.getLogger("srds_fast")
ADVICE = "Change what the reason names, or compile without strict."


def warn_fallback(fast: Any, how: str, reason: str) -> None:
    """Warn that calls do not run in parallel, but "step by step" or "on its stock loop"."""
    kind = re.sub(r" at step \d+", "", reason)
    refusal = f"This call cannot be accelerated: {reason}. strict=True does not allow to run it {how}. {ADVICE}"
    _warn_once(fast, kind, f" runs {how}: {reason}.", UnsupportedPipeline(refusal))


def warn_left_out(fast: Any, reason: str) -> None:
    """Warn that a network option was not applied."""
    refusal = (
        f"The network cannot be made faster as asked: {reason}. strict=True does not allow to leave it out. {ADVICE}"
    )
    _warn_once(fast, reason, f": {reason}.", UnsupportedPipeline(refusal))


def warn_eager(fast: Any, reason: str) -> None:
    """Warn that calls run eagerly; an error with strict=True only if a graph engine was given by name."""
    refusal = CaptureFailed(
        f"This call cannot use graphs: {reason}. strict=True does not allow to run it without them. "
        "Change what the reason names, pass engine='auto', or compile without strict."
    )
    asked_for = fast._srds.planner.engine in GRAPH_ENGINES
    _warn_once(fast, reason, f" runs without graphs: {reason}.", refusal if asked_for else None)


def _warn_once(fast: Any, kind: str, message: str, refusal: SrdsFastError | None) -> None:
    """Log a warning of a kind once for this compiled pipeline; with strict=True raise the refusal instead."""
    if fast._srds.options.strict and refusal is not None:
        raise refusal
    if kind not in fast._srds.notified:
        fast._srds.notified[kind] = True
        logger.warning("%s%s", type(fast).__name__, message)


@contextmanager
def errors_held_back() -> Iterator[None]:
    """Hold back errors that the blocks of a modular pipeline log in the block; if it raises, they are logged then.

    A call that cannot be made in turns ends with an exception and starts again on the stock loop. The user reads the
    reason in the report, and no traceback of an error that is none.
    """
    blocks, thread = logging.getLogger("diffusers.modular_pipelines.modular_pipeline"), threading.get_ident()
    held: list[logging.LogRecord] = []

    def passes(record: logging.LogRecord) -> bool:
        if record.thread != thread or record.levelno < logging.ERROR:
            return True
        held.append(record)
        return False

    blocks.addFilter(passes)
    try:
        yield
        held.clear()
    finally:
        blocks.removeFilter(passes)
        for record in held:
            blocks.handle(record)
