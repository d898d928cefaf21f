"""A separate set of tokenizers for every running call.

A fast tokenizer has one padding and truncation state for all threads, and pipelines change it in every call. Two calls
that share a tokenizer can get each other's padding, without an error. So each call borrows copies.

A copy is used as long as its original holds what it held when the copy was made: users load and unload tokens, and set
lengths and sides, between calls.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..caches import Cache

# longer dictionaries and lists, such as vocabularies, are known by identity and length
MOST_ENTRIES = 64
# of the vocabulary, with its merges
BYTES_OF_A_TOKEN = 500
# types of most values; every call asks for some hundred
_PLAIN = frozenset({type(None), bool, int, float, str})
# what decides nothing, or is set by every call
_BESIDE = ("init_inputs", "init_kwargs", "deprecation_warnings")
# of the Rust object of a fast tokenizer; `padding` and `truncation` are set by every call
_STAGES = ("normalizer", "pre_tokenizer", "post_processor")


class TokenizerPool:
    """Copies of a pipeline's tokenizers: made when first needed, lent to one call at a time, kept for later calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # by number; each with what the originals held when it was made
        self._free: Cache[tuple[Any, dict[str, Any]]] = Cache("copies of tokenizers", size=_size_of)
        self._numbers = itertools.count()

    def clear(self) -> None:
        """Give up the copies that no call uses."""
        self._free.clear()

    @contextmanager
    def borrow(self, pipe: Any) -> Iterator[dict[str, Any]]:
        """The pipe's tokenizers by component name, as copies that no other call uses meanwhile."""
        originals = {name: part for name, part in vars(pipe).items() if name.startswith("tokenizer") and callable(part)}
        state = {name: _held_by(original) for name, original in originals.items()}
        with self._lock:
            for number, (copied_state, _) in self._free.items():
                if copied_state != state:
                    self._free.pop(number)
            taken = next((self._free.pop(number) for number, _ in self._free.items()), None)
            copies = None if taken is None else taken[1]
        if copies is None:
            copies = {name: copy.deepcopy(original) for name, original in originals.items()}
        try:
            yield copies
        finally:
            with self._lock:
                self._free[next(self._numbers)] = state, copies


def _size_of(entry: Any) -> int:
    """Bytes of copies, most of them in Rust, where they cannot be asked for: by the number of their tokens."""
    _, (_, copies) = entry
    return BYTES_OF_A_TOKEN * sum(len(each) if hasattr(each, "__len__") else 0 for each in copies.values())


def _held_by(tokenizer: Any) -> Any:
    """What decides the tokens that a tokenizer makes of a text: equal to an earlier result if nothing has changed."""
    held = {name: _held(value) for name, value in vars(tokenizer).items() if name not in _BESIDE}
    added = repr(getattr(tokenizer, "added_tokens_decoder", None))  # textual inversion adds tokens and removes them
    backend = getattr(tokenizer, "_tokenizer", None)
    stages = [_state_of(getattr(backend, name, None)) for name in _STAGES]
    return _by_identity(tokenizer), held, added, stages


def _held(value: Any) -> Any:
    if isinstance(value, dict | list | tuple) and len(value) <= MOST_ENTRIES:
        names, values = (list(value), list(value.values())) if isinstance(value, dict) else (None, list(value))
        types = list(map(type, values))
        return names, types, values if _PLAIN.issuperset(types) else [_held(each) for each in values]
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    return _by_identity(value), len(value) if hasattr(value, "__len__") else None


def _by_identity(value: Any) -> Any:
    """Equal for the same object only, which is kept alive: its number is given to no other one."""
    return id(value), value


def _state_of(stage: Any) -> Any:
    """A stage of a fast tokenizer: its Python object is made anew whenever it is asked for."""
    return stage.__getstate__() if hasattr(type(stage), "__setstate__") else stage
