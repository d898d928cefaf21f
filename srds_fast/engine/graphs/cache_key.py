"""Cache keys: what a recording depends on beside its inputs, compared before every replay.

A graph reads weights at the addresses they had when it was recorded, and has the network's Python numbers, branches and
attention processors built in. A replay sees weights that are written in place. Every other change (a LoRA loaded,
switched or half loaded, a scale, a processor, FreeU) gives another key.
"""

from __future__ import annotations

import dis
import functools
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})
# attributes of every module: its parts are looked at one by one, its hooks by `hooked`
_MACHINERY = frozenset(nn.Module().__dict__) - {"training"}
_OPAQUE = (nn.Module, type, FunctionType, MethodType, ModuleType)
# how deep objects in objects are looked into; deeper ones are compared by identity
DEPTH = 3
# objects behind one denoiser: a simulator has more
MOST_LOOKED_AT = 10_000
_BUILTIN = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)
_CONTAINERS = (list, tuple, dict, set, frozenset, FunctionType, MethodType, functools.partial)


def network_key(network: nn.Module, live: frozenset[int] = frozenset()) -> Hashable:
    """Where the tensors of a network lie, and what numbers, switches and processors its modules hold.

    It waits for nothing and copies nothing: a few milliseconds of the host for a network of a thousand modules.

    Args:
        live: dictionaries, by identity, whose values are inputs of the recording: only their names count.
    """
    found: list[Any] = []
    for module in network.modules():
        state = module.__dict__
        found += (weakref.ref(module), type(module), type(module).forward)
        for tensors in (state["_parameters"], state["_buffers"]):
            for tensor in tensors.values():
                if tensor is not None:
                    found += _of_tensor(tensor)
        for name, value in state.items():
            if name not in _MACHINERY:
                value = tuple(value) if id(value) in live else value
                found.append(value if type(value) in PLAIN else _of_value(value))
    return tuple(found)


def _of_value(value: Any, depth: int = DEPTH) -> Hashable:
    kind = type(value)
    if kind in PLAIN:
        return value  # type: ignore[no-any-return]
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, list | tuple):
        return kind, *(_of_value(each, depth) for each in value)
    if isinstance(value, set | frozenset):
        return kind, frozenset(_of_value(each, depth) for each in value)
    if isinstance(value, dict):
        return kind, *value.keys(), *(_of_value(each, depth) for each in value.values())
    if isinstance(value, nn.Module):
        return weakref.ref(value)
    if depth:
        # an attention processor or a configuration: it has settings of its own
        return _Same(value), *((name, _of_value(each, depth - 1)) for name, each in attributes_of(value).items())
    return _Same(value)


class _Same:
    """An object by identity. It is held: after its end, another object may get its id."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object; none of modules, classes and functions, which are compared by identity."""
    if isinstance(value, _OPAQUE):
        return {}
    held = dict(getattr(value, "__dict__", ()))
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                held[name] = getattr(value, name)
    return held


def _of_tensor(tensor: Tensor) -> tuple[Hashable, ...]:
    try:
        return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
    except (RuntimeError, ValueError):  # quantized, which is several tensors; or lazy, which is not made yet
        return _Same(tensor), type(tensor)


def tensors_of(network: nn.Module) -> Iterator[Tensor]:
    """Every tensor that the key of a network holds."""
    for module in network.modules():
        state = module.__dict__
        for name, value in (*state["_parameters"].items(), *state["_buffers"].items(), *state.items()):
            if name not in _MACHINERY:
                yield from _tensors_in(value)


def _tensors_in(value: Any, depth: int = DEPTH) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from _tensors_in(each, depth)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors_in(each, depth)
    elif depth and type(value) not in PLAIN:
        for each in attributes_of(value).values():
            yield from _tensors_in(each, depth - 1)


def hooked(network: nn.Module) -> str | None:
    """The name of a part of the network that has a hook, or None: a replay would not call it."""
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "every module"
    for name, module in network.named_modules():
        state = module.__dict__
        # diffusers' and accelerate's hooks, and torch.compile, replace `forward` of the instance
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or not _is_its_own(module, state.get("forward")):
            return name or type(module).__name__
    return None


def _is_its_own(module: nn.Module, forward: Any) -> bool:
    """Whether `forward` is the class's: accelerate puts that into the instance when it removes its hooks."""
    if forward is None:
        return True
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward


def modules_of(function: Callable[..., Any]) -> tuple[nn.Module, ...]:
    """The modules that a callable is, is bound to, or names in its closure, its defaults or its globals."""
    return tuple(value for value in _behind(function) if isinstance(value, nn.Module))


def function_key(function: Callable[..., Any]) -> Hashable:
    """Equal for functions of one code with the same values and modules behind them, such as lambdas made in a loop.

    Raises:
        ValueError: its result depends on an object that cannot be compared by value; it is named.
    """
    return tuple(_of_leaf(value) for value in _behind(function))


def _of_leaf(value: Any) -> Hashable:
    if type(value) in PLAIN:
        return type(value), value
    if isinstance(value, CodeType):
        return value
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, nn.Module):
        return weakref.ref(value)
    if isinstance(value, (type, ModuleType, *_BUILTIN)):
        return _Same(value)
    if not isinstance(value, _CONTAINERS) and not attributes_of(value):
        raise ValueError(f"behind the denoiser is a {type(value).__name__}, of which it is not known what it holds")
    return type(value).__name__  # its parts follow


def _behind(function: Callable[..., Any]) -> Iterator[Any]:
    """A callable and everything that it can reach, each object once. Modules are not looked into."""
    seen: dict[int, Any] = {}
    waiting: list[Any] = [function]
    while waiting:
        value = waiting.pop()
        if type(value) in PLAIN:
            yield value
        elif id(value) not in seen:
            seen[id(value)] = value
            if len(seen) > MOST_LOOKED_AT:
                raise ValueError(f"more than {MOST_LOOKED_AT} objects are behind the denoiser")
            yield value
            waiting += _parts(value)


def _parts(value: Any) -> Iterator[Any]:
    """What an object depends on."""
    if isinstance(value, (nn.Module, Tensor, type, ModuleType, CodeType, *_BUILTIN)):
        return
    if isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, set | frozenset):
        yield from sorted(value, key=repr)
    elif isinstance(value, dict):
        yield from (*value.keys(), *value.values())
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, FunctionType):
        yield from (value.__code__, value.__defaults__, value.__kwdefaults__)
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # the cell is empty: the variable has no value yet
                yield cell.cell_contents
        yield from _globals_of(value)
    else:
        if callable(value):
            yield type(value).__call__
        yield from attributes_of(value).values()


def _globals_of(function: FunctionType) -> Iterator[Any]:
    """The globals that a function reads; of modules among them, the plain attributes that it may read."""
    read, names = _names(function.__code__)
    for name in sorted(read & function.__globals__.keys()):
        found = function.__globals__[name]
        yield found
        if isinstance(found, ModuleType):
            yield from (each for other in sorted(names) if type(each := getattr(found, other, None)) in PLAIN)


@functools.lru_cache(maxsize=256)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals that a function reads, and all names in it, among them those of attributes."""
    read = {each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _names(constant)
            read |= inner[0]
            names |= inner[1]
    return frozenset(read), frozenset(names)
