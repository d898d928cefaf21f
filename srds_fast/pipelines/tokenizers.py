"""A separate set of tokenizers for every running call.

A fast tokenizer has one padding and truncation state for all threads, and pipelines change it in every call. Two calls
that share a tokenizer can get each other's padding, without an error. So each call borrows copies.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TokenizerPool:
    """Copies of a pipeline's tokenizers: made when first needed, lent to one call at a time, kept for later calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[tuple[Any, dict[str, Any]]] = []

    @contextmanager
    def borrow(self, pipe: Any) -> Iterator[dict[str, Any]]:
        """The pipe's tokenizers by component name, as copies that no other call uses meanwhile."""
        originals = {name: part for name, part in vars(pipe).items() if name.startswith("tokenizer") and callable(part)}
        # textual inversion adds tokens to a tokenizer: older copies are stale then
        state = [(name, id(original), len(original)) for name, original in originals.items()]
        with self._lock:
            self._free = [(copied_state, copies) for copied_state, copies in self._free if copied_state == state]
            copies = self._free.pop()[1] if self._free else None
        if copies is None:
            copies = {name: copy.deepcopy(original) for name, original in originals.items()}
        try:
            yield copies
        finally:
            with self._lock:
                self._free.append((state, copies))
