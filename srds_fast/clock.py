"""Seconds that decide something, such as which plan is faster: the same on all ranks of a call."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Agree = Callable[[float, str], float]
_agree: ContextVar[Agree | None] = ContextVar("srds_fast.agree", default=None)


def agreed(value: float, what: str) -> float:
    """A number that was measured; where several ranks make the call, that of rank 0.

    what: names the number. Ranks that ask for different numbers get an error that names both.
    """
    agree = _agree.get()
    return value if agree is None else agree(value, what)


def since(began: float, what: str) -> float:
    """Seconds since `time.perf_counter()` was `began`, agreed on."""
    return agreed(time.perf_counter() - began, what)


@contextlib.contextmanager
def agreeing(agree: Agree | None) -> Iterator[None]:
    """In the block, numbers are agreed on by this function; None: they are those of this process."""
    token = _agree.set(agree)
    try:
        yield
    finally:
        _agree.reset(token)
