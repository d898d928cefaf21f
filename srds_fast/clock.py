"""Seconds that decide something, such as which plan is faster: without pauses, and the same on all ranks of a call.

Pauses are collections of garbage, and the functions of the user that a call calls back.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Agree = Callable[[float, str], float]
_agree: ContextVar[Agree | None] = ContextVar("srds_fast.agree", default=None)


class _Pauses:
    """Seconds that Python has spent on collecting garbage.

    A collection of all objects takes some tenths of a second in a process that has imported PyTorch and diffusers, as
    long as several calls of a small network. It comes once in a while, whichever call runs then.
    """

    def __init__(self) -> None:
        self.seconds, self._began = 0.0, 0.0
        self._watches, self._lock = False, threading.Lock()

    def watch(self) -> None:
        with self._lock:
            if not self._watches:
                gc.callbacks.append(self._note)
                self._watches = True

    def _note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self.seconds += time.perf_counter() - self._began


_pauses = _Pauses()


def pauses() -> float:
    """Seconds that collections of garbage have taken in this process since the first call of this function."""
    _pauses.watch()
    return _pauses.seconds


class _Stopped(threading.local):
    seconds = 0.0


_stopped = _Stopped()


def stopped_seconds() -> float:
    """Seconds that this thread has spent in blocks of `stopped`."""
    return _stopped.seconds


@contextlib.contextmanager
def stopped() -> Iterator[None]:
    """The block runs a function of the user. Its seconds do not count."""
    began, before = time.perf_counter() - pauses(), _stopped.seconds
    try:
        yield
    finally:  # a call in the block may have stopped the clock, too
        _stopped.seconds = before + time.perf_counter() - pauses() - began


def now() -> float:
    """`time.perf_counter()` that stands still in pauses."""
    return time.perf_counter() - pauses() - stopped_seconds()


def agreed(value: float, what: str) -> float:
    """A number that was measured; where several ranks make the call, that of rank 0.

    what: names the number. Ranks that ask for different numbers get an error that names both.
    """
    agree = _agree.get()
    return value if agree is None else agree(value, what)


def since(began: float, what: str) -> float:
    """Seconds since `now()` was `began`, agreed on."""
    return agreed(now() - began, what)


@contextlib.contextmanager
def agreeing(agree: Agree | None) -> Iterator[None]:
    """In the block, numbers are agreed on by this function; None: they are those of this process."""
    token = _agree.set(agree)
    try:
        yield
    finally:
        _agree.reset(token)
