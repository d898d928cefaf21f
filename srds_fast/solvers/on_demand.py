"""Sequences whose values are made when they are first asked for: of long programs most waves are never run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar, overload

Given = TypeVar("Given")
Value = TypeVar("Value", covariant=True)


def mapped(function: Callable[[Given], Value], values: Sequence[Given]) -> Sequence[Value]:
    """What a function makes of each value: on demand where the values are, else at once."""
    if isinstance(values, OnDemand):
        return OnDemand(len(values), lambda: map(function, values))
    return tuple(map(function, values))


class OnDemand(Sequence[Value]):
    """The values of an iterator, in its order; each is made once, and kept.

    It may be read by several threads. Two such sequences are never equal.

    begin: makes the iterator; it is called again after an exception, Ctrl-C included, has ended the one before.
    """

    def __init__(self, length: int, begin: Callable[[], Iterator[Value]]) -> None:
        self._length, self._begin = length, begin
        self._values: Iterator[Value] | None = None
        self._made: list[Value] = []
        self._lock = threading.Lock()

    @property
    def made(self) -> int:
        """Values that have been made."""
        return len(self._made)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Value, ...]: ...
    def __getitem__(self, index: int | slice) -> Value | tuple[Value, ...]:
        places = range(self._length)[index]
        if isinstance(places, range):
            return tuple(self[place] for place in places)
        if places >= len(self._made):
            self._make(places + 1)
        return self._made[places]

    def _make(self, count: int) -> None:
        with self._lock:
            if self._values is None:
                self._values = islice(self._begin(), len(self._made), None)
            try:
                while len(self._made) < count:
                    self._made.append(next(self._values))
            except BaseException:
                self._values = None
                raise
