"""Typed errors. Every message says what happened, why, and what to do, in short sentences."""

from __future__ import annotations

from typing import Any


class SrdsFastError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidArgument(SrdsFastError, ValueError):
    """An argument is out of its range or of the wrong shape."""


class UnsupportedPipeline(SrdsFastError, TypeError):
    """`compile` was given something it cannot drive."""


class UnsupportedScheduler(SrdsFastError, ValueError):
    """The scheduler or one of its options does not step x = alpha * x0 + sigma * eps deterministically."""


class PlanMismatch(SrdsFastError, ValueError):
    """A saved plan does not fit the pipeline, device or call it is used with."""


class CaptureFailed(SrdsFastError, RuntimeError):
    """A CUDA graph could not be captured."""


class DivergenceError(SrdsFastError, ArithmeticError):
    """The network returned NaN or Inf, or the iteration moved away from its limit.

    Attributes:
        report: what ran until then, a `srds_fast.Report`.
        what: happened, the first sentence of the message.
    """

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report
        self.what = message.partition(". ")[0]
