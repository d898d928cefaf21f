"""Typed errors. Every message says what happened, why, and what to do, in short sentences."""

from __future__ import annotations

from typing import Any

MOST_SHOWN = 200  # characters


def shown(value: object) -> str:
    """A value of the user's in a message: shortened, and by its type alone if it cannot be shown."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


class SrdsFastError(Exception):
    """Base class of the errors of this package."""


class InvalidArgument(SrdsFastError, ValueError):
    """An argument is out of its range or of the wrong shape."""


class UnknownArgument(InvalidArgument, TypeError):
    """A call was given a keyword that its pipeline does not know."""


class UnsupportedPipeline(SrdsFastError, TypeError):
    """`compile` cannot accelerate this object, or strict=True forbids a fallback."""


class UnsupportedScheduler(SrdsFastError, ValueError):
    """The scheduler, or one of its options, is not supported."""


class PlanMismatch(SrdsFastError, ValueError):
    """A saved plan is not valid for this pipeline, device or call."""


class CaptureFailed(SrdsFastError, RuntimeError):
    """A graph could not be captured."""


class DivergenceError(SrdsFastError, ArithmeticError):
    """The network returned NaN or Inf, or the iteration diverged.

    Attributes:
        report: a `srds_fast.Report` of the call until then.
    """

    def __init__(self, message: str, report: Any = None) -> None:  # unpickled from the message, then given its report
        super().__init__(message)
        self.report = report
