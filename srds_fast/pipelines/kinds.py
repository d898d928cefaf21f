"""Kinds of calls: everything that the turns of a loop can depend on, so that a rehearsal is made once for each."""

from __future__ import annotations

import dis
import inspect
import weakref
from collections.abc import Hashable, Mapping
from functools import partial
from numbers import Number
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..caches import cached
from ..engine.graphs.cache_key import Same
from .modular.arguments import is_modular
from .state import Arguments

_UNKNOWN = object()
# the types of most settings; every call asks for some hundred values
_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})
# longer tensors are conditioning, which is known by its shape: a call may show that it is used in another way
MOST_SETTINGS = 8
# longer lists of a part, such as the 49,000 merges of a tokenizer, are known by identity and length: every call asks
MOST_ENTRIES = 64
# what turns do not depend on: a rehearsal finds a loop that draws, whichever generator it draws from
_BESIDE_THE_LOOP = ("callback_on_step_end", "generator", "output_type", "return_dict")


class KindOfLoop(NamedTuple):
    """The kind of a call: its loop, and the arguments by value, or by shape and type."""

    loop: Hashable  # class and code of the pipeline, its parts, and the types of the arguments
    given: Hashable


def kind_of_loop(pipe: Any, arguments: Arguments) -> KindOfLoop | None:
    """The kind of a call; None if an argument or a part is of an unknown type."""
    cls = type(pipe.original)
    code = getattr(inspect.unwrap(cls.__call__), "__code__", None)
    parts = [(name, kind_of_part(part)) for name, part in vars(pipe).items() if name[0] != "_" and name != "scheduler"]
    own = [(name, value) for name, value in vars(pipe).items() if name[0] == "_" and isinstance(value, Number | str)]
    marks = set_by(cls)
    parts += [(name, value) for name, value in own if name not in marks]
    if is_modular(pipe):
        parts += [("blocks", _of_blocks(pipe._blocks)), ("config", _of_settings(pipe.config))]
    given = [
        (name, _of_value(value, by_value="prompt" not in name))
        for name, value in arguments.items()
        if value is not pipe and name not in _BESIDE_THE_LOOP
    ]
    if any(kind is _UNKNOWN for _, kind in (*parts, *given)):
        return None
    types = tuple((name, type(arguments[name])) for name, _ in given)
    return KindOfLoop((cls, code, type(pipe.scheduler), tuple(parts), types), tuple(given))


def set_by(cls: type) -> set[str]:
    """The attributes that the loop of a pipeline's class sets: marks of a call, and no settings of its user."""
    calls = [inspect.unwrap(each.__dict__["__call__"]) for each in cls.__mro__ if "__call__" in each.__dict__]
    return {"_interrupt"}.union(*(_stored_by(code) for call in calls if (code := getattr(call, "__code__", None))))


@cached
def _stored_by(code: CodeType) -> frozenset[str]:
    return frozenset(each.argval for each in dis.get_instructions(code) if each.opname == "STORE_ATTR")


def kind_of_part(part: Any) -> Hashable:
    """A network by identity, anything else by its settings."""
    if isinstance(part, nn.Module):
        weights = next(part.parameters(), None)  # `.to()` changes them, and not the module
        return weakref.ref(part), None if weights is None else (weights.dtype, weights.device)
    found = _of_value(part)
    if found is not _UNKNOWN:
        return found
    if isinstance(part, FunctionType | MethodType | partial):  # a method that the user has replaced
        return part
    # guiders and processors: their settings
    return type(part), _of_settings(getattr(part, "__dict__", {}))


def _of_settings(settings: Mapping[str, Any], objects: bool = True) -> Hashable:
    """objects: look into settings that are objects, but not deeper; False: such a setting is known by its identity."""
    found = []
    for name, value in settings.items():
        long = isinstance(value, dict | list | tuple | set | frozenset) and len(value) > MOST_ENTRIES
        kind = (type(value), Same(value), len(value)) if long else _of_value(value)
        if kind is _UNKNOWN:
            kind = _of_object(value) if objects else (type(value), id(value))
        found.append((name, kind))
    return tuple(found)


def _of_object(value: Any) -> Hashable:
    """By its own settings: each stock call makes another momentum for its guider."""
    held = getattr(value, "__dict__", None)
    if callable(value) or held is None:
        return type(value), id(value)
    return type(value), _of_settings(held, objects=False)


def _of_blocks(block: Any) -> Hashable:
    """Class, code and settings of a modular pipeline's block, and of those in it."""
    beside = ("sub_blocks", "_progress_bar_config")
    settings = {name: value for name, value in vars(block).items() if name not in beside}
    code = getattr(inspect.unwrap(type(block).__call__), "__code__", None)
    inner = tuple((name, _of_blocks(each)) for name, each in (block.sub_blocks or {}).items())
    return type(block), code, _of_settings(settings), inner


def _of_value(value: Any, by_value: bool = True) -> Hashable:
    if by_value and type(value) in _PLAIN:
        return type(value), value
    if isinstance(value, dict | list | tuple):
        names, values = (tuple(value), tuple(value.values())) if isinstance(value, dict) else (None, tuple(value))
        types = tuple(map(type, values))
        if by_value and _PLAIN.issuperset(types):
            return type(value), names, types, values
        kinds = tuple(_of_value(each, by_value) for each in values)
        return _UNKNOWN if any(kind is _UNKNOWN for kind in kinds) else (type(value), names, kinds)
    if value is None or isinstance(value, Number | torch.dtype | torch.device):
        return type(value), value
    if isinstance(value, str):
        return str, value if by_value else bool(value)
    if isinstance(value, Tensor):
        # a few numbers are settings: a guidance scale may be given as a tensor
        held = tuple(value.flatten().tolist()) if value.numel() <= MOST_SETTINGS else None
        return Tensor, value.shape, value.dtype, value.device, held
    if isinstance(value, torch.Generator):
        return (torch.Generator,)
    size = getattr(value, "size", None)
    if isinstance(size, tuple):  # an image
        return type(value), size, getattr(value, "mode", None)
    if isinstance(size, int) and hasattr(value, "tobytes"):  # an array
        return type(value), str(value.dtype), value.shape, value.tobytes() if size <= MOST_SETTINGS else None
    return _UNKNOWN
