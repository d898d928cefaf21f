"""Ending a call early: what `cancel=`, `on_wave=` and diffusers' `_interrupt` ask is looked at before every wave.

    with srds_fast.using(cancel=event, on_wave=show):
        fast(prompt)  # also inside other people's code, in this thread or asyncio task alone

The call that is under way has a `Watch`, which lower rooms find by `current()`. A wave costs nothing beside that while
nobody asks: the watch is None then.

A call is left by an exception that derives from BaseException, as asyncio's CancelledError and KeyboardInterrupt do.
Handlers of `Exception` between a wave and the call, in this package, in diffusers or in a user's code, must not take it
for a fault of the network. At the end of the call it becomes the exception that the user sees.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from .. import clock
from ..errors import Cancelled, InvalidArgument, shown


class Cancel(Protocol):
    """What ends calls: a threading.Event, an asyncio.Event, anything that can be asked."""

    def is_set(self) -> bool:
        """Whether to end. It is asked in the thread of the call, before every wave."""


OnWave = Callable[[int, int, int], object]
"""(wave, rows, settled) -> None; see `using`. What it raises ends the call."""


@dataclass(frozen=True, eq=False)
class _Asked:
    """What one `using`, or one call, asks for."""

    cancel: Cancel | None
    on_wave: OnWave | None

    def __post_init__(self) -> None:
        if self.cancel is not None and not callable(getattr(self.cancel, "is_set", None)):
            raise InvalidArgument(
                f"cancel is {shown(self.cancel)}. Its is_set() is called before every wave. Pass a threading.Event()."
            )
        if self.on_wave is not None and not callable(self.on_wave):
            raise InvalidArgument(
                f"on_wave is {shown(self.on_wave)}. It is called before every wave. Pass a function "
                "(wave, rows, settled)."
            )
        if self.on_wave is not None and not _takes(self.on_wave, 3):
            raise InvalidArgument(
                f"on_wave is {shown(self.on_wave)}, which cannot be called with three numbers. Pass a function "
                "(wave, rows, settled)."
            )


def _takes(function: Any, arguments: int) -> bool:
    """Whether it can be called with so many, as far as its signature tells."""
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:  # of a builtin; a class of these is not called for its effect
        return not isinstance(function, type)
    return True


class Left(BaseException):
    """A call is left in the middle. watch: of the call."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch


class Ended(Left):
    """The call raises `why`."""

    def __init__(self, watch: Watch, why: Exception) -> None:
        super().__init__(watch)
        self.why = why


class Interrupted(Left):
    """The call returns what it has: diffusers' `_interrupt`."""


class Watch:
    """Looks whether one call is to end.

    interrupted: whether diffusers' `_interrupt` asks for it. parent: the watch of the call that makes this one.
    asks: whether somebody asks by `cancel` or `on_wave`, of this call or of one around it.
    """

    def __init__(
        self, asked: tuple[_Asked, ...], interrupted: Callable[[], bool] | None, parent: Watch | None = None
    ) -> None:
        self.asked, self.interrupted, self._parent = asked, interrupted, parent
        self.asks: bool = bool(asked) or (parent is not None and parent.asks)
        self.waves = self.settled = 0  # waves that were begun; settled steps of the call's own run
        self._aside = False

    def wave(self, rows: int, settled: int | None = None, *, interrupts: bool = True) -> None:
        """A wave begins. Raises `Left`.

        settled: steps that no later wave changes. interrupts: False where an interrupt is looked for elsewhere.
        """
        if settled is not None and not self._aside:
            self.settled = settled
        if self.asks:
            self.look_within()
        if interrupts and self.interrupted is not None and self.interrupted():
            raise Interrupted(self)
        for each in self.asked:
            if each.on_wave is not None:
                try:
                    with clock.stopped():
                        each.on_wave(self.waves, rows, self.settled)
                except Exception as why:
                    raise Ended(self, why) from None
        self.waves += 1

    def look(self) -> None:
        """Before a network call that is no wave of its own. Raises `Left`."""
        self.look_within()
        if self.interrupted is not None and self.interrupted():
            raise Interrupted(self)

    def look_within(self) -> None:
        """The same in the middle of code that returns nothing if it is left: an interrupt waits for its end."""
        for each in self.asked:
            if each.cancel is not None:
                try:
                    ends = each.cancel.is_set()
                except Exception as why:
                    raise Ended(self, why) from None
                if ends:
                    raise Ended(self, Cancelled.after(self.waves, self.settled))
        if self._parent is not None:
            self._parent.look_within()

    def is_ending(self) -> bool:
        """Whether the call, or one around it, will end at its next wave. It may be asked by another thread."""
        own = any(each.cancel is not None and each.cancel.is_set() for each in self.asked)
        return own or (self._parent is not None and self._parent.is_ending())

    def settle(self, steps: int) -> None:
        """So many steps of a run are settled."""
        if not self._aside:
            self.settled = steps

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """In the block, waves are those of other runs than the call's own."""
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before


_asked: ContextVar[tuple[_Asked, ...]] = ContextVar("srds_fast.asked", default=())
_watch: ContextVar[Watch | None] = ContextVar("srds_fast.watch", default=None)
current = _watch.get


@contextlib.contextmanager
def using(*, cancel: Cancel | None = None, on_wave: OnWave | None = None) -> Iterator[None]:
    """Calls of this package in the block can be cancelled, and tell of their waves.

    It reaches the calls of compiled pipelines, of `sample` and of streams that are made in this thread, or in this
    asyncio task and the threads that `asyncio.to_thread` gives it, also by other people's code. It works as a decorator
    too. Blocks may be nested: each `cancel` ends the calls, each `on_wave` is called, the outer one first.

    Both are looked at before every wave, in whatever way a call runs: of every method, of the sequential loop and of
    the pipeline's own loop, and of what a call does beside its own run to measure costs, to time other plans, to check
    the network or to compare samples. So at most one network call follows. Several processes that share no rows look
    less often: calls that are predicted to take 0.05 s may follow. Where a CUDA graph of the loop is replayed, nothing
    is looked at within a launch, which holds the waves up to an iteration's image: `cancel` is looked at before each
    launch, and `on_wave` is told of its waves once they are launched.

    Args:
        cancel: anything with `is_set()`, such as a `threading.Event`. Once it is set, a call raises `Cancelled`.
        on_wave: called with three numbers before a wave: how many waves the call has begun before it, of whatever kind;
            the rows of the wave; and how many steps of the call's own run are settled, which no later wave changes.
            An exception that it raises ends the call with that exception. It runs in the thread of the call. Where a
            call falls back to the pipeline's own loop, each network call counts as a wave of one row, and the settled
            steps are what the scheduler tells of them, or 0. Such a loop is a little slower than without: torch calls
            the look at every module of the network.

    Raises:
        InvalidArgument: cancel has no `is_set`, or on_wave cannot be called.
    """
    token = _asked.set((*_asked.get(), _Asked(cancel, on_wave)))
    try:
        yield
    finally:
        _asked.reset(token)


class watching:
    """The block is one call. At its end what has left it becomes what the user sees.

    cancel, on_wave: of the call alone, beside those of `using`. interrupted: see `Watch`. always: other ranks may end
    the call, whatever was asked here.
    """

    def __init__(
        self,
        cancel: Cancel | None = None,
        on_wave: OnWave | None = None,
        interrupted: Callable[[], bool] | None = None,
        *,
        always: bool = False,
    ) -> None:
        own = () if cancel is None and on_wave is None else (_Asked(cancel, on_wave),)
        parent = current()
        # the calls around this one look at what they were asked
        around = () if parent is None else parent.asked
        asked = (*(each for each in _asked.get() if each not in around), *own)
        # the waves of a call within another one are no waves of that
        looks = always or asked or interrupted is not None or parent is not None
        self._watch = Watch(asked, interrupted, parent) if looks else None
        self._looks = not always  # otherwise the call looks when the others can be told

    def __enter__(self) -> Watch | None:
        if self._watch is not None:
            self._token = _watch.set(self._watch)
            try:
                if self._looks:
                    self._watch.look_within()
            except Ended as ended:
                _watch.reset(self._token)
                why = ended.why
            else:
                return self._watch
            raise why
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._watch is None:
            return
        _watch.reset(self._token)
        self._watch.asked, self._watch.interrupted = (), None  # reports of the call hold its run
        if isinstance(error, Ended) and error.watch is self._watch:
            why, context = error.why, error.why.__context__
            try:
                raise why
            finally:  # what happened inside is no part of the story
                why.__context__ = context


def wave(rows: int) -> None:
    """A wave of `rows` rows begins, beside the runs of the call. Raises `Left`."""
    if (watch := current()) is not None:
        watch.wave(rows)


def look() -> None:
    """See `Watch.look`."""
    if (watch := current()) is not None:
        watch.look()


def look_within() -> None:
    """See `Watch.look_within`."""
    if (watch := current()) is not None:
        watch.look_within()


def aside() -> contextlib.AbstractContextManager[None]:
    """See `Watch.aside`."""
    return contextlib.nullcontext() if (watch := current()) is None else watch.aside()
