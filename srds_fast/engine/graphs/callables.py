"""What a callable depends on, as far as it can be looked up: its code, its values, its networks."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Hashable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .cache_key import attributes_of

# more than any denoiser needs; a simulator behind it may have more
MOST_LOOKED_AT = 10_000
_FUNCTIONS = (FunctionType, MethodType, functools.partial)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def networks_of(function: Callable[..., Any]) -> tuple[nn.Module, ...]:
    """The modules that a callable is, is bound to, or names: in its closure, its defaults, or among its globals."""
    return tuple(value for value in _reached(function) if isinstance(value, nn.Module))


def signature_of(function: Callable[..., Any]) -> Hashable:
    """Equal for callables that do the same: of one code, with the same numbers, modules and objects behind them.

    A lambda written in a loop is another object each time, and the same by this.

    Raises:
        ValueError: what it does depends on something that cannot be looked into; it is named.
    """
    return tuple(_leaf(value) for value in _reached(function))


def _leaf(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, CodeType):
        return value
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape
    if isinstance(value, nn.Module | type | ModuleType) or (type(value).__module__ == "builtins" and not _holds(value)):
        return id(value)
    if not _holds(value):
        raise ValueError(f"behind the denoiser is a {type(value).__name__}, of which it is not known what it holds")
    return type(value).__name__  # what is in it comes after it


def _holds(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict, set, frozenset, *_FUNCTIONS)) or bool(attributes_of(value))


def _reached(function: Callable[..., Any]) -> Iterator[Any]:
    """The callable and all that is looked up behind it, each once; modules are not looked into."""
    seen: dict[int, Any] = {}
    waiting: list[Any] = [function]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _PLAIN):
            yield value
        elif id(value) not in seen:
            seen[id(value)] = value
            if len(seen) > MOST_LOOKED_AT:
                raise ValueError(
                    f"more than {MOST_LOOKED_AT} objects are behind the denoiser: it cannot be known by them"
                )
            yield value
            if not isinstance(value, nn.Module | Tensor | type | ModuleType):
                waiting += _behind(value)


def _behind(value: Any) -> Iterator[Any]:
    if isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, set | frozenset):
        yield from sorted(value, key=repr)
    elif isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, FunctionType):
        code = value.__code__
        read, every = _names(code)
        yield from (code, value.__defaults__, value.__kwdefaults__)
        yield from (cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))
        for name in sorted(read & value.__globals__.keys()):
            found = value.__globals__[name]
            yield found
            if isinstance(found, ModuleType):  # of a module, the numbers that may be meant
                yield from (each for other in sorted(every) if isinstance(each := getattr(found, other, None), _PLAIN))
    elif not isinstance(value, CodeType):
        if callable(value):
            yield type(value).__call__
        yield from attributes_of(value).values()


@functools.lru_cache(maxsize=256)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals that a function reads, and every name in it: those of attributes are among them."""
    read = {each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    every = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _names(constant)
            read |= inner[0]
            every |= inner[1]
    return frozenset(read), frozenset(every)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
