"""What a recording of a network depends on beside its arguments, to be compared before every replay.

A graph reads weights where they lay when it was recorded, and has the network's Python numbers, its branches and its
attention processors built in. Weights written in place are seen by a replay. All else that moves (a LoRA that is
loaded, switched or half loaded, a scale, a processor, FreeU) gives another fingerprint.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})
# what every module has: its parts are looked at as such, its hooks by `hooked`
_MACHINERY = frozenset(nn.Module().__dict__) - {"training"}
_NOT_LOOKED_INTO = (nn.Module, type, FunctionType, MethodType, ModuleType)
# objects in objects in objects: of what lies deeper, which it is is all that is looked at
DEPTH = 3


def fingerprint(network: nn.Module, live: frozenset[int] = frozenset()) -> Hashable:
    """Where the tensors of a network lie and what numbers, switches and processors its modules hold; equal for equals.

    It waits for nothing and copies nothing: a few milliseconds of the host for a network of a thousand modules.

    Args:
        live: dictionaries, by identity, whose values a recording is given anew: of them only the names count.
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
                found.append(value if type(value) in _PLAIN else _of_value(value))
    return tuple(found)


def _of_value(value: Any, depth: int = DEPTH) -> Hashable:
    kind = type(value)
    if kind in _PLAIN:
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
        # an attention processor, a configuration: with settings of its own
        return _Same(value), *((name, _of_value(each, depth - 1)) for name, each in attributes_of(value).items())
    return _Same(value)


class _Same:
    """An object by identity. It is held: the number of one that is gone may be that of another."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def attributes_of(value: Any) -> dict[str, Any]:
    """What an object holds; of modules, classes and functions nothing: which they are is all that is looked at."""
    if isinstance(value, _NOT_LOOKED_INTO):
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
    except (RuntimeError, ValueError):  # quantized: of several tensors; or not made yet
        return _Same(tensor), type(tensor)


def tensors_of(network: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a fingerprint looks at."""
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
    elif depth and type(value) not in _PLAIN:
        for each in attributes_of(value).values():
            yield from _tensors_in(each, depth - 1)


def hooked(network: nn.Module) -> str | None:
    """The name of a part of the network that a hook hangs on, or None: a replay would not call it."""
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "every module"
    for name, module in network.named_modules():
        state = module.__dict__
        # `forward` of its own: diffusers' and accelerate's hooks put themselves there, as torch.compile does
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or not _is_its_own(module, state.get("forward")):
            return name or type(module).__name__
    return None


def _is_its_own(module: nn.Module, forward: Any) -> bool:
    """What the class would give: accelerate puts that back when it takes its hooks away."""
    if forward is None:
        return True
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward
