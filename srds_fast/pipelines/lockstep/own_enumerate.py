"""A copy of a pipeline's `__call__` in which `enumerate` numbers a turn by its step, not by how many came before it."""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable, Iterable
from typing import Any


def by_step(iterable: Iterable[Any], start: int = 0) -> Any:
    """`enumerate`, but timesteps are numbered by themselves."""
    pairs = getattr(iterable, "pairs", None)
    return builtins.enumerate(iterable, start) if pairs is None else pairs(start)


def with_own_enumerate(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function, and of the decorators around it, that uses `by_step`.

    Neither the function nor its module is changed. Where a decorator keeps the function in an unknown way, that
    decorator and the function are used as they are.
    """
    if not isinstance(function, types.FunctionType):
        return function
    inner = getattr(function, "__wrapped__", None)
    closure = function.__closure__
    names = {**function.__globals__, "enumerate": by_step}
    if inner is not None:
        if closure is None or not any(_holds(cell, inner) for cell in closure):
            return function
        own = with_own_enumerate(inner)
        closure = tuple(types.CellType(own) if _holds(cell, inner) else cell for cell in closure)
        names = function.__globals__
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    vars(copy).update(vars(function))
    return copy


def _holds(cell: types.CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False
