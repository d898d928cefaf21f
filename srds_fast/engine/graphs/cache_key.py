"""Cache keys: what a recording depends on besides its inputs, compared before every replay.

A graph reads weights at the addresses they had when it was recorded, and has the network's Python numbers, branches and
attention processors built in. A replay sees weights that are written in place. Every other change (a LoRA loaded,
switched or half loaded, a scale, a processor, FreeU) gives another key.
"""

from __future__ import annotations

import dis
import functools
import inspect
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import suppress
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from ...caches import cached

PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})
# attributes of every module: its parts are visited one by one, its hooks by `hooked`
MACHINERY = frozenset(nn.Module().__dict__) - {"training"}
# their attributes are not part of a key
OPAQUE = (nn.Module, Tensor, type, FunctionType, MethodType, ModuleType)
_CONTAINERS = (list, tuple, dict, set, frozenset)
_FUNCTIONS = (FunctionType, MethodType, functools.partial)
# how deep objects in objects are visited; deeper ones are compared by identity
DEPTH = 3
# objects behind one denoiser: a simulator has more
MOST_VISITED = 10_000


def network_key(network: nn.Module, live: frozenset[int] = frozenset()) -> Hashable:
    """Where the tensors of a network lie, and what numbers, switches and processors its modules hold.

    live: dictionaries, by identity, whose values are inputs of the recording: only their names count.
    """
    return tuple(leaf if type(leaf) in PLAIN else _key_of(leaf) for leaf in _leaves_of(network, live))


def tensors_of(network: nn.Module) -> list[Tensor]:
    """Every tensor that the key of a network holds."""
    return [leaf for leaf in _leaves_of(network) if isinstance(leaf, Tensor)]


def _leaves_of(network: nn.Module, live: frozenset[int] = frozenset()) -> list[Any]:
    """All that the modules of a network hold: tensors, modules, plain values, and objects as `Same`."""
    return [leaf for module in network.modules() for leaf in leaves_of_module(module, live)]


def leaves_of_module(module: nn.Module, live: frozenset[int] = frozenset()) -> list[Any]:
    """All that a module itself holds, without what its submodules hold."""
    state = module.__dict__
    found: list[Any] = [module, type(module), type(module).forward]
    found += state["_parameters"].values()
    found += state["_buffers"].values()
    for name, value in state.items():
        if name not in MACHINERY:
            _add_leaves(tuple(value) if id(value) in live else value, found, DEPTH)
    return found


def _add_leaves(value: Any, found: list[Any], depth: int) -> None:
    if type(value) in PLAIN or isinstance(value, (Tensor, nn.Module)):
        found.append(value)
        return
    if isinstance(value, _CONTAINERS):
        found += (type(value), len(value))
    else:  # an attention processor or a configuration has settings of its own
        found.append(Same(value))
        if not depth:
            return
        depth -= 1
    for part in _parts(value):
        _add_leaves(part, found, depth)


def _key_of(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        try:
            return leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride()
        except (RuntimeError, ValueError):  # quantized, which is several tensors; or lazy, which is not made yet
            return Same(leaf), type(leaf)
    return weakref.ref(leaf) if isinstance(leaf, nn.Module) else leaf


class Same:
    """An object by identity. It is held: after its end, another object may get its id."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _parts(value: Any) -> Collection[Any]:
    """The elements of a container, or the names and values of an object's attributes; none of an opaque object."""
    if isinstance(value, OPAQUE):
        return ()
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    held = value if isinstance(value, dict) else _attributes_of(value)
    return [*held.keys(), *held.values()]


def _attributes_of(value: Any) -> dict[str, Any]:
    state = object.__getstate__(value)  # None, a dictionary, or a pair of them where a class has slots
    pair = state if isinstance(state, tuple) else (state,)
    return {name: each for held in pair for name, each in (held or {}).items()}


def hooked(network: nn.Module) -> str | None:
    """The name of a part of the network that has a hook, or None: a replay would not call it."""
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "every module"
    for name, module in network.named_modules():
        state = module.__dict__
        # Hooks of diffusers and accelerate, and torch.compile, replace `forward` of the instance. When accelerate
        # removes its hooks, it puts the class's own forward there.
        forward = state.get("forward")
        own = forward is None or forward == MethodType(type(module).forward, module)
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or not own:
            return name or type(module).__name__
    return None


def modules_of(function: Callable[..., Any]) -> tuple[nn.Module, ...]:
    """The modules that a callable is, is bound to, or names in its closure, its defaults or its globals."""
    return tuple(value for value in reached_by(function) if isinstance(value, nn.Module))


def function_key(function: Callable[..., Any]) -> Hashable:
    """Equal for functions of one code with the same values and modules behind them, such as lambdas made in a loop.

    Raises ValueError, with the name of an object that its result depends on and that cannot be compared by value.
    """
    return tuple(map(_key_behind, reached_by(function)))


def _key_behind(value: Any) -> Hashable:
    if type(value) in PLAIN:
        return type(value), value
    if isinstance(value, (Tensor, nn.Module, CodeType)):
        return _key_of(value)
    if isinstance(value, (*_CONTAINERS, *_FUNCTIONS)):
        return type(value).__name__  # its parts follow
    if isinstance(value, (type, ModuleType)) or inspect.isroutine(value):
        return Same(value)
    if not _attributes_of(value):
        raise ValueError(f"the denoiser refers to a {type(value).__name__}, whose contents are not known")
    return type(value).__name__


def reached_by(function: Callable[..., Any]) -> Iterator[Any]:
    """A callable and everything that it can reach, each object once. Modules are not visited.

    Raises ValueError if these are too many.
    """
    seen: dict[int, Any] = {}
    waiting: list[Any] = [function]
    while waiting:
        value = waiting.pop()
        if type(value) not in PLAIN:
            if id(value) in seen:
                continue
            seen[id(value)] = value
            if len(seen) > MOST_VISITED:
                raise ValueError(f"the denoiser refers to more than {MOST_VISITED} objects")
            waiting += _parts_behind(value)
        yield value


def _parts_behind(value: Any) -> Iterator[Any]:
    """What the result of a callable, or the value of an object, depends on."""
    if isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, FunctionType):
        yield from (value.__code__, value.__defaults__, value.__kwdefaults__)
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # the cell is empty: the variable has no value yet
                yield cell.cell_contents
        read, names = _names(value.__code__)
        for name in sorted(read & value.__globals__.keys()):
            found = value.__globals__[name]
            yield found
            if isinstance(found, ModuleType):  # of its attributes, plain values that the code may read
                yield from (each for other in sorted(names) if type(each := getattr(found, other, None)) in PLAIN)
    elif not inspect.isroutine(value):
        if callable(value) and not isinstance(value, OPAQUE):
            yield type(value).__call__
        yield from _parts(value)


def global_names(code: CodeType) -> frozenset[str]:
    """The globals that a function reads, and those that the functions in it read."""
    return _names(code)[0]


@cached
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals that a function reads, and all names in it, among them those of attributes."""
    read = {each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner_read, inner_names = _names(constant)
            read |= inner_read
            names |= inner_names
    return frozenset(read), frozenset(names)
