"""Functions that a user has put on a pipeline object or on its scheduler, most often in the place of a method.

A call runs on copies of both. A function on the object acts on the object that it was made for: wrapped
`prepare_latents` reads the user's scheduler, which has not been set for this call. So where a function can find the
pipeline, calls run on the stock loop, where everything is what the user made it. So do all calls with a scheduler whose
methods were replaced: the loop of the call would not ask it for its steps one by one.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from ..engine.graphs.cache_key import global_names
from ..schedulers.reader import replaced_methods
from .hooks import KNOWN

# objects at most in which a pipeline is looked for
MOST_LOOKED_AT = 10_000
_PLAIN = (type(None), bool, int, float, str, bytes, ModuleType, type, nn.Module, Tensor)
_PACKAGES = (*KNOWN, "builtins", "collections", "functools", "numpy", "tokenizers", "PIL")


def why_replaced(pipe: Any) -> str | None:
    """Why a replaced method keeps a call from running on copies, a clause; None: nothing does."""
    if names := replaced_methods(pipe.scheduler):
        return f"{names[0]} of its scheduler was replaced on the object: put it into a class of your own"
    for name, function in functions_of(pipe):
        if _reaches(function, pipe):
            return (
                f"{name} was put on the pipeline object, and uses the pipeline itself: make it a method of a class of "
                "your own"
            )
    return None


def shallow_copy(pipe: Any, cls: type, **parts: Any) -> Any:
    """A copy of a pipeline, of this class, for one call, with these parts."""
    twin: Any = object.__new__(cls)
    vars(twin).update({**vars(pipe), **parts})
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


def _reaches(function: Any, pipe: Any) -> bool:
    """Whether a function can find the pipeline or its scheduler: in its closure, arguments, objects, or globals."""
    waiting, seen = [function], set[int]()
    while waiting and len(seen) < MOST_LOOKED_AT:
        value = waiting.pop()
        if _is(value, pipe) or value is pipe.scheduler:
            return True
        if id(value) not in seen and not isinstance(value, _PLAIN):
            seen.add(id(value))
            waiting += _held_by(value)
    return False


def _held_by(value: Any) -> list[Any]:
    if not isinstance(value, FunctionType):
        return gc.get_referents(value)
    names = value.__globals__
    named = [names[each] for each in global_names(value.__code__) & names.keys()]
    return [value.__closure__, value.__defaults__, value.__kwdefaults__, *named]
