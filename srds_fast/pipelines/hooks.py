"""Hooks on the modules of a pipeline: those of accelerate and diffusers, and those of the user.

Hooks of accelerate and diffusers move weights, or keep a state between calls. A hook of the user's may change what a
module is given or returns, or only watch, which its bytecode tells.
"""

from __future__ import annotations

import dis
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from ..caches import cached

# attributes that hold them
OFFLOADING = frozenset({"_hf_hook", "_diffusers_hook"})
# attributes that hold torch's own
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# packages whose code keeps nothing between calls, unless an attribute of a module shows it
KNOWN = ("torch", "diffusers", "transformers", "accelerate", "peft", "xformers", "srds_fast")
# what hooks that count or keep what they see end with; not "add", which is also a name of what returns a tensor
_COLLECT = ("append", "extend", "insert", "update", "put", "put_nowait", "clear")
_RETURN_NOTHING = (*_COLLECT, "set", "setattr", "print")


def hooked(root: nn.Module) -> list[nn.Module]:
    """A module and its submodules that have hooks.

    Every call of a pipeline looks for them once, so this walks the dictionaries: `modules()` takes three times as long.
    """
    found: list[nn.Module] = []
    left: list[nn.Module | None] = [root]
    while left:
        if (module := left.pop()) is not None:
            state = module.__dict__
            if not state.keys().isdisjoint(OFFLOADING) and _has_hooks(state):
                found.append(module)
            left += state["_modules"].values()
    return found


def _has_hooks(state: dict[str, Any]) -> bool:
    """Whether the attributes of a module hold hooks: `cache_context` of a network leaves a registry without any."""
    return "_hf_hook" in state or bool(state["_diffusers_hook"].hooks)


def hooks_of(found: Iterable[nn.Module]) -> Iterator[Any]:
    """diffusers' hooks on the modules that `hooked` has found."""
    for module in found:
        registry = getattr(module, "_diffusers_hook", None)
        yield from [] if registry is None else registry.hooks.values()


def hooked_parts(pipe: Any) -> dict[str, list[nn.Module]]:
    """The modules that have hooks, by the name of the part of a pipeline that they belong to."""
    return {name: hooked(part) for name, part in vars(pipe).items() if isinstance(part, nn.Module)}


def is_offloaded(found: Sequence[nn.Module]) -> bool:
    """Whether hooks move the weights of a network at every call. found: its modules that have hooks."""
    if any(hasattr(module, "_hf_hook") for module in found):
        return True
    return any(hasattr(hook, "next_group") or hasattr(hook, "group") for hook in hooks_of(found))


def execution_device(pipe: Any, found: Mapping[str, Sequence[nn.Module]] | None = None) -> torch.device:
    """The device that the networks of a pipeline run on. found: its `hooked_parts`, where they are known.

    diffusers' own property looks at every module four times, which takes some milliseconds: it is asked only where
    there are hooks, or parts on several devices.
    """
    parts = [part for part in vars(pipe).values() if isinstance(part, nn.Module)]
    if not any((hooked_parts(pipe) if found is None else found).values()):
        first = [next(itertools.chain(part.parameters(), part.buffers()), None) for part in parts]
        devices = {tensor.device for tensor in first if tensor is not None}
        if len(devices) == 1:
            return devices.pop()
    device: torch.device = pipe._execution_device
    return device


@cached
def on_device(cls: type, device: torch.device) -> type:
    """The class of a pipeline's copy for one call, which knows the `execution_device`.

    It is found once in a call. diffusers' own property, which a pipeline asks in each call, would look for it again.
    """
    own = getattr(cls, "_execution_device", None)
    if not isinstance(own, property) or package_of(own.fget) != "diffusers":
        return cls
    shown = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), {"_execution_device": device, **shown})


def package_of(code: Any) -> str:
    """The package that a function, a class or an object is from."""
    return str(getattr(code, "__module__", None) or type(code).__module__).partition(".")[0]


def foreign_hooks(module: nn.Module) -> list[Any]:
    """The hooks of a module that are from packages that are not known."""
    hooks = [hook for name in HOOKS if (table := module.__dict__[name]) for hook in list(table.values())]
    return [each for each in hooks if package_of(getattr(each, "func", each)) not in KNOWN]


def acting_hooks(module: nn.Module) -> list[Any]:
    """Those of them that may change what a module is given, or what it returns."""
    return [each for each in foreign_hooks(module) if not only_watches(each)]


def only_watches(hook: Any) -> bool:
    """Whether a hook returns nothing, so that it changes neither what a module is given nor what it returns."""
    function = _function_of(hook)
    if not isinstance(function, FunctionType):
        function = type(function).__call__
    return isinstance(function, FunctionType) and _returns_nothing(function.__code__)


def code_of_hook(hook: Any) -> Any:
    """The code of a hook: one that is hung up anew for every call is the same. What it reads `ModuleState` compares."""
    code = getattr(_function_of(hook), "__code__", None)
    return type(hook) if code is None else code


def _function_of(hook: Any) -> Any:
    function = getattr(hook, "func", hook)
    return getattr(function, "__func__", function)


@cached
def _returns_nothing(code: CodeType) -> bool:
    before: list[dis.Instruction] = []
    for each in dis.get_instructions(code):
        if each.opname == "RETURN_CONST" and each.argval is not None:
            return False
        if each.opname == "RETURN_VALUE":
            if each.is_jump_target or not before:
                return False
            nothing = before[-1].opname == "LOAD_CONST" and before[-1].argval is None
            if not nothing and _called_last(before) not in _RETURN_NOTHING:
                return False
        before.append(each)
    return True


def _called_last(before: list[dis.Instruction]) -> str | None:
    """The name of the function whose result these instructions end with, as in `lambda *given: seen.append(given)`."""
    if not before or before[-1].opname != "CALL":
        return None
    arguments, rest = before[-1].arg, before[:-1]
    if rest and rest[-1].opname == "PRECALL":  # in Python 3.11, a part of CALL
        rest.pop()
    for each in reversed(rest):
        if arguments == 0 and each.opname in ("LOAD_METHOD", "LOAD_ATTR", "LOAD_GLOBAL"):
            return str(each.argval)
        assert arguments is not None
        arguments -= dis.stack_effect(each.opcode, each.arg, jump=False)
        if arguments < 0 or each.is_jump_target:
            return None
    return None
