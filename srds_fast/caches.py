"""What is computed once and kept for later calls: every cache of this package, bounded by bytes over all of them.

The bound is of host memory: 256 MiB, or the number of bytes in the environment variable SRDS_FAST_CACHE_BYTES, or what
`limit` was called with. Beyond it the entries that were used least recently go, whichever cache they are in. Sizes are
estimates: of Python objects and of tensors on the CPU, each counted once for every entry that holds it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, ParamSpec, TypeVar, cast

from .errors import InvalidArgument, shown

VARIABLE = "SRDS_FAST_CACHE_BYTES"
DEFAULT_LIMIT = 2**28
# entries of one cache: looking for what is kept takes no longer with more, but keys of many small entries add up
MOST_ENTRIES = 256

Value = TypeVar("Value")
Given = ParamSpec("Given")
Result = TypeVar("Result")

_lock = threading.RLock()
_caches: weakref.WeakSet[Cache[Any]] = weakref.WeakSet()
_uses = itertools.count()
_total = 0  # bytes of all entries


@dataclass(slots=True)
class _Entry:
    value: Any
    nbytes: int
    used: int  # number of the last use
    uses: int = 1
    kept: int = 0  # blocks of `keeping` in which it was used


class Cache(MutableMapping[Hashable, Value]):
    """Values by key, one of the caches that share the bound; the least recently used goes first.

    Args:
        name: for `sizes`.
        most: entries at most.
        stays: whether a value must not be given up, as a promise was made about it. Default: none must stay.
        size: bytes of a key and its value. Default: `size_of`.

    May be used from several threads. A key may be gone whenever it is asked for: use `get` and `setdefault`.
    """

    def __init__(
        self,
        name: str,
        most: int = MOST_ENTRIES,
        stays: Callable[[Any], bool] = lambda value: False,
        size: Callable[[Any], int] | None = None,
    ) -> None:
        self.name, self._most, self._stays, self._size = name, most, stays, size or size_of
        self._entries: dict[Hashable, _Entry] = {}
        with _lock:
            _caches.add(self)
        weakref.finalize(self, _forget, self._entries).atexit = False

    def __getitem__(self, key: Hashable) -> Value:
        with _lock:
            entry = self._entries[key]
            entry.used = next(_uses)
            entry.uses += 1
            _keep(entry)
            if entry.uses.bit_count() == 1:  # values fill in what they need later: they are measured again, ever rarer
                self._measure(key, entry)
                _evict()
            return cast(Value, entry.value)

    def __setitem__(self, key: Hashable, value: Value) -> None:
        with _lock:
            self.pop(key)
            entry = self._entries[key] = _Entry(value, 0, next(_uses))
            _keep(entry)
            self._measure(key, entry)
            self._drop_one_of_many(key)
            _evict()

    def setdefault(self, key: Hashable, default: Value = None) -> Value:  # type: ignore[assignment]
        """The value of a key, which is `default` if there was none; all threads get the same one."""
        with _lock:
            if key in self._entries:
                return self[key]
            self[key] = default
            return default

    def __delitem__(self, key: Hashable) -> None:
        global _total
        with _lock:
            entry = self._entries.pop(key)
            _total -= entry.nbytes  # before its value goes, which may hold caches of its own

    def pop(self, key: Hashable, default: Any = None) -> Any:
        """The value of a key, which is gone then, or `default`; it does not count as a use."""
        with _lock:
            entry = self._entries.get(key)
            if entry is None:
                return default
            del self[key]
            return entry.value

    def __iter__(self) -> Iterator[Hashable]:
        with _lock:
            return iter(list(self._entries))

    def items(self) -> Any:
        """A copy of all entries, which does not count as a use."""
        with _lock:
            return [(key, entry.value) for key, entry in self._entries.items()]

    def values(self) -> Any:
        """A copy, as `items`."""
        return [value for _, value in self.items()]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def clear(self) -> None:
        with _lock:
            _forget(self._entries)
            self._entries.clear()

    @property
    def nbytes(self) -> int:
        """Of all entries, as they were measured."""
        with _lock:
            return sum(entry.nbytes for entry in self._entries.values())

    def _measure(self, key: Hashable, entry: _Entry) -> None:
        global _total
        before, entry.nbytes = entry.nbytes, self._size((key, entry.value))
        _total += entry.nbytes - before

    def _oldest(self) -> tuple[int, Hashable] | None:
        """The last use and the key of the entry that goes first; None: all must stay."""
        entries = self._entries.items()
        found = ((entry.used, key) for key, entry in entries if not (entry.kept or self._stays(entry.value)))
        return min(found, key=lambda each: each[0], default=None)

    def _drop_one_of_many(self, newest: Hashable) -> None:
        oldest = self._oldest() if len(self) > self._most else None
        if oldest is not None and oldest[1] != newest:
            del self[oldest[1]]


_of_functions: list[Cache[Any]] = []


def cached(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Keep the results of a function by its arguments, which are told apart by their types too, in a `Cache`."""
    cache: Cache[Result] = Cache(f"{function.__module__}.{function.__qualname__}")
    _of_functions.append(cache)

    @functools.wraps(function)
    def look_up(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        key = args, tuple(kwargs.items()), *map(type, args), *map(type, kwargs.values())
        try:
            return cache[key]
        except KeyError:
            pass
        except TypeError:  # an argument that cannot be looked up: the function says what is wrong with it
            return function(*args, **kwargs)
        found = function(*args, **kwargs)
        cache[key] = found
        return found

    cast(Any, look_up).cache_clear = cache.clear  # as of functools
    return look_up


def of_process(name: str, most: int = MOST_ENTRIES) -> Cache[Any]:
    """A cache that all calls of the process share; `clear` empties it."""
    cache: Cache[Any] = Cache(name, most)
    _of_functions.append(cache)
    return cache


def clear() -> None:
    """Empty the caches that all calls of the process share. Those of a compiled pipeline its `reset` empties."""
    for cache in _of_functions:
        cache.clear()


def limit(num_bytes: int) -> None:
    """Set the bound of all caches together, in bytes of host memory; 0: nothing is kept. Raises InvalidArgument."""
    global _limit
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, int) or num_bytes < 0:
        raise InvalidArgument(
            f"The bound of the caches is {shown(num_bytes)}. It must be a whole number of bytes, 0 or more. Pass one, "
            "such as 2**28."
        )
    with _lock:
        _limit = num_bytes
        _evict()


@contextmanager
def keeping() -> Iterator[None]:
    """In the block, what this thread takes from a cache or puts into one stays, whatever the bound.

    For calls whose results are to stay for good: a promise made about a value that has gone would be worth nothing.
    """
    before, _block.entries = _block.entries, []
    try:
        yield
    finally:
        with _lock:
            for entry in _block.entries:
                entry.kept -= 1
            _block.entries = before
            _evict()


class _Block(threading.local):
    entries: list[_Entry] | None = None  # that are kept in the innermost block of this thread; None: it is in none


_block = _Block()


def _keep(entry: _Entry) -> None:
    if _block.entries is not None:
        entry.kept += 1
        _block.entries.append(entry)


def sizes() -> dict[str, int]:
    """Bytes of all caches by name, the largest first; those with one name are added up."""
    found: dict[str, int] = {}
    with _lock:
        for cache in _caches:
            found[cache.name] = found.get(cache.name, 0) + cache.nbytes
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def _limit_asked_for() -> int:
    text = os.environ.get(VARIABLE, "")
    if not text:
        return DEFAULT_LIMIT
    if text.strip().isdecimal():
        return int(text)
    raise InvalidArgument(f"{VARIABLE} is {text!r}. It must be a whole number of bytes, such as {DEFAULT_LIMIT}.")


_limit = _limit_asked_for()


def _evict() -> None:
    """Give up what is beyond the bound."""
    while _total > _limit:
        candidates = [(oldest, each) for each in _caches if (oldest := each._oldest()) is not None]
        if not candidates:
            return
        (_, key), each = min(candidates, key=lambda found: found[0][0])
        del each[key]


def _forget(entries: dict[Hashable, _Entry]) -> None:
    global _total
    with _lock:
        nbytes = sum(entry.nbytes for entry in entries.values())
        _total -= nbytes


# classes, code and modules of others are not held by a cache alone
_OF_OTHERS = (type, ModuleType, CodeType, BuiltinFunctionType, weakref.ref, Enum)
# bytes of the most frequent objects, which hold nothing; whole numbers may be a few bytes longer
_SMALL = {int: 32, float: 24, bool: 0, type(None): 0}


# entries of a long list that are looked at: to count a million rows takes a second
SAMPLED = 32


def size_of(found: Any) -> int:
    """Bytes of host memory that an object takes with all that it holds, but for networks: these are the user's."""
    storages: dict[int, int] = {}
    return _size_of([found], set(), storages) + sum(storages.values())


def _size_of(ahead: list[Any], seen: set[int], storages: dict[int, int]) -> int:
    """Bytes of Python objects. storages: is filled with the bytes of all storages of tensors on the CPU, by place."""
    total = 0
    while ahead:
        each = ahead.pop()
        small = _SMALL.get(type(each))
        if small is not None:
            total += small
            continue
        if id(each) in seen or isinstance(each, (*_OF_OTHERS, Cache)):  # other caches count their own
            continue
        seen.add(id(each))
        total += sys.getsizeof(each)
        if isinstance(each, dict):
            ahead += each.keys()
            ahead += each.values()
        elif isinstance(each, list | tuple):
            if len(each) > 2 * SAMPLED:
                sample = list(each[:: len(each) // SAMPLED])
                some, others, objects = dict[int, int](), dict[int, int](), set[int]()
                nbytes = _size_of(sample[::2], objects, some) + _size_of(sample[1::2], objects, others)
                # a sample tells what views of the same few storages take, but not what different tensors do
                if some.keys() == others.keys():
                    total += len(each) * nbytes // len(sample)
                    storages |= some
                    continue
            ahead += each
        elif isinstance(each, set | frozenset):
            ahead += each
        elif isinstance(each, FunctionType):
            ahead += _closed_over(each)
        elif isinstance(each, MethodType):
            ahead += (each.__self__, each.__func__)
        elif isinstance(each, functools.partial):
            ahead += (each.func, each.args, each.keywords)
        elif hasattr(each, "untyped_storage"):
            if each.device.type == "cpu":
                storage = each.untyped_storage()
                storages[storage.data_ptr()] = int(storage.nbytes())  # views of one count once
        elif not hasattr(each, "named_parameters"):
            if isinstance(each, MutableMapping) or type(each).__name__ == "deque":
                ahead += list(each)
            ahead += vars(each).values() if hasattr(each, "__dict__") else ()
            ahead += (getattr(each, name, None) for name in getattr(type(each), "__slots__", ()))
    return total


def _closed_over(function: FunctionType) -> Iterator[Any]:
    """What a function holds beside its code and its module."""
    yield from (function.__defaults__, function.__kwdefaults__, function.__dict__)
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is still empty
            yield cell.cell_contents


_signatures: Cache[inspect.Signature] = of_process("signatures")


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """`inspect.signature` of a function or a method, made once: one of many arguments takes as long as a short step."""
    of_class: Any = function.__func__ if isinstance(function, MethodType) else function
    key = weakref.ref(of_class), of_class is function
    found = _signatures.get(key)
    if found is None:
        _signatures[key] = found = inspect.signature(function)
    return found
