"""Settings of a network that concurrent calls share: the first call sets them, the last one restores them."""

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
    """Keep a setting while the block runs; yields reasons why it could not be set.

    If another value is set, the call does not wait for it: a call nested in the one that set it would deadlock. It
    still counts as a user, because the network must not change between its waves.

    Args:
        switch: (network, value, stack for the undo callbacks) -> reasons.
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
            conflict = f"another call is using it with {setting}={hold.value!r}"
            yield [f"{setting}={value!r} was not set on {name_of(network)}: {conflict}"]
    finally:
        with _lock:
            hold.users -= 1
            if hold.users == 0:
                del _holds[key]
                hold.undo.close()


def name_of(network: object) -> str:
    """The class name of the network, without torch.compile's wrapper."""
    return type(unwrapped(network)).__name__


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error message; the type of the error if the message is empty."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".:") or type(error).__name__
