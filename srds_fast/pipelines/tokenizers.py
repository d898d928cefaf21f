"""Tokenizers of one's own for every call that is running.

A fast tokenizer keeps padding and truncation in one place for all threads, and a pipeline switches them to and fro:
two calls on one tokenizer can get each other's padding, without an error. So each driven call borrows copies, made when
first needed and kept for the next call.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Spares:
    """Copies of a pipeline's tokenizers, lent to one call at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[tuple[Any, dict[str, Any]]] = []

    @contextmanager
    def lent(self, pipe: Any) -> Iterator[dict[str, Any]]:
        """The pipe's tokenizers by component name, as copies that no other call uses meanwhile."""
        originals = {
            name: component
            for name, component in vars(pipe).items()
            if name.startswith("tokenizer") and callable(component)
        }
        # textual inversion adds tokens to a tokenizer: copies made before are of no use then
        state = [(name, id(original), len(original)) for name, original in originals.items()]
        with self._lock:
            self._free = [(made_of, copies) for made_of, copies in self._free if made_of == state]
            copies = self._free.pop()[1] if self._free else None
        if copies is None:
            copies = {name: copy.deepcopy(original) for name, original in originals.items()}
        try:
            yield copies
        finally:
            with self._lock:
                self._free.append((state, copies))
