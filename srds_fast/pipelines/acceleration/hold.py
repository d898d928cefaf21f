"""Settings of a network that overlapping calls share: the first call sets, the last one puts back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..networks import unwrapped


@dataclass
class _Hold:
    value: Any
    reasons: list[str]
    undo: ExitStack
    users: int = 0


_lock = threading.Lock()
_holds: dict[tuple[nn.Module, str], _Hold] = {}


@contextmanager
def held(
    network: nn.Module, setting: str, value: Any, switch: Callable[[nn.Module, Any, ExitStack], list[str]]
) -> Iterator[list[str]]:
    """Keep a setting while the block runs; yields reasons for what could not be set.

    A call that wants another value than is set does not wait: nested in the call that set it, it would wait for itself.
    It counts as a user all the same: the network must not change between its waves.

    Args:
        switch: (network, value, stack for what undoes it) -> reasons.
    """
    key = (network, setting)
    with _lock:
        if key not in _holds:
            with ExitStack() as undo:
                _holds[key] = _Hold(value, switch(network, value, undo), undo.pop_all())
        hold = _holds[key]
        hold.users += 1
    try:
        if hold.value == value:
            yield hold.reasons
        else:
            other = f"another call is using it with {setting}={hold.value!r}"
            yield [f"{setting}={value!r} was not set on {name_of(network)}: {other}"]
    finally:
        with _lock:
            hold.users -= 1
            if hold.users == 0:
                del _holds[key]
                hold.undo.close()


def name_of(network: object) -> str:
    """The class of the network; torch.compile's wrapper is looked through."""
    return type(unwrapped(network)).__name__


def first_sentence(error: BaseException) -> str:
    """What an error says first, or its type if it says nothing."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".:") or type(error).__name__
