"""Functions that a user has put on a pipeline object or on its scheduler, most often in the place of a method.

A call runs on copies of both. A function on the object acts on the object that it was made for: wrapped
`prepare_latents` reads the user's scheduler, which has not been set for this call. So functions of a pipeline are bound
to the copy where they hold the pipeline in a way that can be followed; other calls run on the stock loop, where
everything is what the user made it. So do all calls with a scheduler whose methods were replaced: the loop of the call
would not ask it for its steps one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import suppress
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from ..engine.graphs.cache_key import reached_by
from ..schedulers.reader import replaced_methods
from .hooks import KNOWN

_PLAIN = (type(None), bool, int, float, str, bytes, ModuleType, type, nn.Module, Tensor)
_PACKAGES = (*KNOWN, "builtins", "collections", "functools", "numpy", "tokenizers", "PIL")


def why_replaced(pipe: Any) -> str | None:
    """Why a replaced method keeps a call from running on copies, a clause; None: nothing does."""
    if names := replaced_methods(pipe.scheduler):
        return f"{names[0]} of its scheduler was replaced on the object: put it into a class of your own"
    for name, function in functions_of(pipe):
        if _reaches(_bound_to(function, pipe, object()), pipe):
            return (
                f"{name} was put on the pipeline object, and uses the pipeline itself: make it a method of a class of "
                "your own"
            )
    return None


def shallow_copy(pipe: Any, cls: type, **parts: Any) -> Any:
    """A copy of a pipeline, of this class, for one call: with these parts, and the user's functions bound to it."""
    twin: Any = object.__new__(cls)
    functions = {name: _bound_to(function, pipe, twin) for name, function in functions_of(pipe)}
    vars(twin).update({**vars(pipe), **functions, **parts})
    return twin


def functions_of(pipe: Any) -> Iterator[tuple[str, Any]]:
    """Functions among the attributes of a pipeline, and objects of the user's that may have methods."""
    for name, value in list(vars(pipe).items()):
        if isinstance(value, _PLAIN) or name == "scheduler":
            continue
        package = type(value).__module__.partition(".")[0]
        if isinstance(value, FunctionType | MethodType | functools.partial) or package not in _PACKAGES:
            yield name, value


def _is(value: Any, pipe: Any) -> bool:
    """Whether it is the pipeline, original or compiled: these share their attributes."""
    return getattr(value, "__dict__", None) is vars(pipe)


def _bound_to(value: Any, pipe: Any, twin: Any) -> Any:
    """A function, with the copy in the place of the pipeline that it is bound to, closes over, or is given first."""
    if _is(value, pipe):
        return twin
    if isinstance(value, MethodType):
        return MethodType(value.__func__, twin) if _is(value.__self__, pipe) else value
    if isinstance(value, functools.partial):
        args = [_bound_to(each, pipe, twin) for each in value.args]
        kwargs = {name: _bound_to(each, pipe, twin) for name, each in value.keywords.items()}
        return functools.partial(_bound_to(value.func, pipe, twin), *args, **kwargs)
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    cells = tuple(_bound_cell(cell, pipe, twin) for cell in value.__closure__)
    if all(map(lambda new, old: new is old, cells, value.__closure__)):
        return value
    found = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    found.__kwdefaults__ = value.__kwdefaults__
    return found


def _bound_cell(cell: CellType, pipe: Any, twin: Any) -> CellType:
    """The same cell, which the function may share with others, unless it holds the pipeline."""
    try:
        held = cell.cell_contents
    except ValueError:  # the variable has no value yet
        return cell
    bound = _bound_to(held, pipe, twin)
    return cell if bound is held else CellType(bound)


def _reaches(function: Any, pipe: Any) -> bool:
    """Whether a function can find the pipeline or its scheduler: in its closure, arguments, objects, or globals."""
    with suppress(ValueError):  # too many objects to look at
        return any(_is(value, pipe) or value is pipe.scheduler for value in reached_by(function))
    return False
