"""What a callable depends on, as far as it can be looked up: its code, its values, its networks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def networks_of(function: Callable[..., Any]) -> tuple[nn.Module, ...]:
    """The modules that a callable is, is bound to, or names: in its closure, its defaults, or among its globals."""
    return tuple(value for value in _reached(function) if isinstance(value, nn.Module))


def signature_of(function: Callable[..., Any]) -> Hashable:
    """Equal for callables that do the same: of one code, with the same numbers, modules and objects behind them.

    A lambda written in a loop is another object each time, and the same by this.
    """
    return tuple(_leaf(value) for value in _reached(function))


def _leaf(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, CodeType):
        return value
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape
    if (
        isinstance(value, list | tuple | dict | functools.partial)
        or hasattr(value, "__code__")
        or hasattr(value, "__func__")
    ):
        return type(value).__name__  # what is in it comes after it
    return id(value)


def _reached(function: Callable[..., Any]) -> Iterator[Any]:
    """The callable and all that is looked up behind it, each once; modules are not looked into."""
    seen: set[int] = set()
    waiting: list[Any] = [function]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _PLAIN):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            yield value
            if not isinstance(value, nn.Module | Tensor):
                waiting += _behind(value)


def _behind(value: Any) -> Iterator[Any]:
    if isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif (function := getattr(value, "__func__", None)) is not None:  # a bound method
        yield from (function, value.__self__, getattr(value.__self__, "__dict__", None))
    elif (code := getattr(value, "__code__", None)) is not None:
        yield from (code, value.__defaults__, value.__kwdefaults__)
        yield from (cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))
        yield from (value.__globals__[name] for name in _names(code) if name in value.__globals__)
    elif callable(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
        yield from (type(value).__call__, vars(value))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
