"""diffusers' `_interrupt`: which of the calls that run on one pipeline it is meant for.

A stock pipeline makes one call at a time, and its attribute `_interrupt` ends it. Several calls of a compiled pipeline
may run at once, on the attributes of one pipeline. One that is set ends one call:

- in a thread that makes a call (in its callback, its hook, its network), or reads its stream: that call;
- elsewhere, or on the user's own pipeline, of which no thread is known: the call that began first.

A mark that is set while no call runs is dropped when the next one begins, as a stock call does.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..engine.distributed.call import SharedCall
from ..sampling.stream import reader

NAME = "_interrupt"


class RunningCall:
    """A call under way. asked: whether it is to end early. itself: it runs on the pipeline, which reads its mark."""

    def __init__(self, interrupts: Interrupts) -> None:
        self.asked = self.itself = False
        self.threads = threading.get_ident(), reader.get()
        self._interrupts, self._attributes = interrupts, interrupts.attributes

    def is_asked(self) -> bool:
        """Whether it is to end early, by now."""
        if self._attributes.get(NAME):
            self._interrupts.look()
        return self.asked

    def end_early(self) -> None:
        """Ask it to."""
        self.asked = True
        if self.itself:
            self._attributes[NAME] = True


class Interrupts:
    """The calls that run on one pipeline. May be used from several threads."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._running: list[RunningCall] = []
        self._lock = threading.RLock()

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the pipeline, which compiled ones share."""
        return vars(self._pipe())

    @contextmanager
    def running(self) -> Iterator[RunningCall]:
        """The block is a call."""
        call = RunningCall(self)
        with self._lock:
            self.look()  # a mark is for those that run already
            if self.attributes.get(NAME) and not self._on_itself():
                self.attributes[NAME] = False  # left by an earlier call
            self._running.append(call)
        try:
            yield call
        finally:
            with self._lock:
                self._running.remove(call)

    @contextmanager
    def on_pipeline_itself(self, call: RunningCall) -> Iterator[None]:
        """In the block, a call runs on the user's own pipeline: the mark in its attributes belongs to it."""
        with self._lock:
            self.look()
            call.itself = True
        try:
            yield
        finally:
            with self._lock:
                call.itself = False
                if len(self._running) > 1:  # its mark is not for the others
                    self.attributes[NAME] = False

    def look(self) -> None:
        """Give a mark that was set on the attributes to the call that it is meant for."""
        if self.attributes.get(NAME):
            with self._lock:
                if self._running and not self._on_itself() and self.attributes.get(NAME):
                    self.attributes[NAME] = False
                    self._running[0].end_early()

    def mark(self, value: Any) -> None:
        """`_interrupt` of the compiled pipeline was set, in this thread."""
        with self._lock:
            own = self._own()
            if value and self._running:
                (own or self._running[0]).end_early()
                return
            if own is not None:
                own.asked = False
            self.attributes[NAME] = value

    def value(self) -> Any:
        """What `_interrupt` of the compiled pipeline reads as, in this thread."""
        with self._lock:
            own = self._own() or next(iter(self._running), None)
            return (own is not None and own.asked) or self.attributes[NAME]

    def _on_itself(self) -> bool:
        return any(each.itself for each in self._running)

    def _own(self) -> RunningCall | None:
        """The call of this thread, the one that began last."""
        thread = threading.get_ident()
        return next((each for each in reversed(self._running) if thread in each.threads), None)


def with_shared_mark(cls: type, shared: SharedCall) -> type:
    """The class of a pipeline whose loop ends early on all ranks of a call at the same step, if one was interrupted.

    The mark is agreed on where the loop reads it. On the pipeline itself another rank would not know of it.
    """

    def read(pipe: Any) -> bool:
        return shared.look()

    def write(pipe: Any, value: Any) -> None:
        vars(pipe)[NAME] = value
        if value:
            asks = shared.asks
            shared.asks = lambda: bool(vars(pipe)[NAME]) or asks()

    return type(cls.__name__, (cls,), {NAME: property(read, write), "__module__": cls.__module__})


def own_attributes(twin: Any) -> dict[str, Any]:
    """Those that a call has left on the copy of a pipeline, but for the mark and the scheduler."""
    return {name: value for name, value in vars(twin).items() if name not in (NAME, "scheduler")}


_of: dict[int, Interrupts] = {}  # by identity of the pipeline, until that is collected
_lock = threading.Lock()


def interrupts_of(pipe: Any) -> Interrupts:
    """Those of a pipeline, however often it is compiled."""
    with _lock:
        if id(pipe) not in _of:
            _of[id(pipe)] = Interrupts(pipe)
            weakref.finalize(pipe, _of.pop, id(pipe), None)
        return _of[id(pipe)]


def interrupt_property() -> property:
    """`_interrupt` of a class of compiled pipelines."""

    def read(fast: Any) -> Any:
        try:
            return fast._srds.interrupts.value()
        except KeyError:
            raise AttributeError(f"{type(fast).__name__!r} object has no attribute {NAME!r}") from None

    def write(fast: Any, value: Any) -> None:
        fast._srds.interrupts.mark(value)

    return property(read, write, doc="Set it to end the call of this thread early, or else the one that began first.")
