"""Typed errors. Every message says what happened, why, and what to do, in short sentences."""

from __future__ import annotations

from typing import Any

from .words import counted

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


class RankError(SrdsFastError, RuntimeError):
    """Base class of the errors of calls that several ranks make together. Every rank raises the same one."""


class RankMismatch(RankError):
    """Ranks were called with different arguments, networks or versions."""


class RankFailed(RankError):
    """A rank has left the call by an error, so it has ended on all ranks.

    Attributes:
        rank: the first that failed.
    """

    def __init__(self, message: str, rank: int = 0) -> None:
        super().__init__(message)
        self.rank = rank


class RankLost(RankError):
    """A rank has ended, or does not answer within the timeout of its group."""


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


class Cancelled(SrdsFastError):
    """The call was cancelled: `cancel.is_set()` was true before a wave.

    Attributes:
        waves: waves that were begun, of the run and of all that the call does beside it.
        settled_steps: steps of the run that no later wave would have changed.
        report: of `sample`, a `srds_fast.Report` of the call until then. None of a compiled pipeline: see its `report`.
    """

    def __init__(self, message: str, waves: int = 0, settled_steps: int = 0, report: Any = None) -> None:
        super().__init__(message)
        self.waves, self.settled_steps, self.report = waves, settled_steps, report

    @classmethod
    def after(cls, waves: int, settled_steps: int) -> Cancelled:
        """With the message for so many waves and steps."""
        return cls(
            f"The call was cancelled after {counted(waves, 'wave')}, with {counted(settled_steps, 'step')} finished. "
            "The event that was given as cancel is set. Clear it, or pass another one, before the next call.",
            waves,
            settled_steps,
        )
