"""What modules hold: compared with what they held before, and given back to them.

Whatever switches a network shows here: adapters and their scales, attention processors, FreeU, hooks, a function in the
place of `forward`, other submodules, weights that are written to. Weights are not copied or read: torch counts the
writes to a tensor. A write through `.data`, or by code that is not torch's, is not counted, and is not seen.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..engine.graphs.cache_key import DEPTH, MACHINERY, OPAQUE, PLAIN, global_names
from ..errors import UnsupportedPipeline
from .hooks import HOOKS, KNOWN, OFFLOADING, foreign_hooks, only_watches, package_of

_CONTAINERS = (list, dict, set, tuple, frozenset)
_version = operator.attrgetter("_version")


class NetworkChanged(Exception):
    """A part of a network holds something else than at the beginning of a run. The message is a clause.

    by_hook: a hook of the user's hangs on the networks, and may have changed it.
    """

    def __init__(self, part: str, by_hook: bool) -> None:
        super().__init__(f"{part} was changed in the middle of the call")
        self.by_hook = by_hook


class WeightsWritten(UnsupportedPipeline):
    """A loop or a hook has written to weights, of which there is no copy: the call cannot start again."""

    def __init__(self, part: str) -> None:
        super().__init__(
            f"{part} was written to in the call, by the pipeline's loop or by a hook. What it held before is not "
            "known, so the call cannot start again. Load the weights again, and call the original pipeline."
        )


class ModuleState:
    """What the modules of some networks hold at one moment.

    generators: random generators that `restore` is to set back, beside those that the networks hold.
    foreign_hook: the first part that has a hook from a package that is not known, or None.
    """

    def __init__(self, networks: Iterable[nn.Module], generators: Iterable[torch.Generator] = ()) -> None:
        self.foreign_hook: str | None = None
        # what modules hold; what is read by functions in the place of `forward`, by hooks, and by hooks that only watch
        self._modules, self._functions, self._hooks, self._watching = self._all = _Held(), _Held(), _Held(), _Held()
        seen: set[int] = set()
        for network in networks:
            waiting: list[tuple[str, nn.Module]] = [(type(network).__name__, network)]
            while waiting:  # `named_modules()` takes twice as long
                name, module = waiting.pop()
                if id(module) not in seen:
                    seen.add(id(module))
                    self._look_at(name, module)
                    children = list(module.__dict__["_modules"].items())
                    waiting += [(f"{name}.{child}", each) for child, each in children if each is not None]
        for each in self._all:
            each.complete()
        every = chain(generators, *(each.generators for each in self._all))
        self._random = [(each, each.get_state()) for each in dict.fromkeys(every)]

    def is_as_new(self) -> bool:
        """Whether another `ModuleState` of the networks would hold the same. To make one takes 20 times as long.

        Random generators are always read anew.
        """
        return not self._random and all(each.is_same(_all_identical) for each in self._all)

    def _look_at(self, name: str, module: nn.Module) -> None:
        state, held = module.__dict__, self._modules
        attributes = {each: value for each, value in list(state.items()) if each not in MACHINERY}
        held.add(name, state, tuple(attributes))
        for table in ("_modules", *HOOKS):
            held.add(name, state[table])
        if moved := not OFFLOADING.isdisjoint(state):  # in every call its weights are moved
            held.moved = True
        else:
            for table in ("_parameters", "_buffers"):
                held.add(name, state[table])
                held.tensors += [(f"{name}.{each}", tensor) for each, tensor in list(state[table].items())]
        for attribute, value in attributes.items():
            if type(value) not in PLAIN and attribute not in OFFLOADING:
                held.look_into(name, value, DEPTH)
        if (forward := attributes.get("forward")) is not None and not moved:
            self._functions.look_behind(name, forward)
        for hook in foreign_hooks(module):
            self.foreign_hook = self.foreign_hook or name
            (self._watching if only_watches(hook) else self._hooks).look_behind(name, hook)

    def is_same(self) -> bool:
        """Whether all hold what they held, and no tensor was written to."""
        return all(each.is_same() for each in self._all)

    def changed(self, *, in_order: bool = False) -> str | None:
        """The name of a part that holds something else now, or None. Equal numbers, and lists of them, are the same.

        Tensors that a network keeps where there was nothing before, or on another device, are no change: networks of
        diffusers keep what they have computed from the shape of their input. What functions read is none either.
        in_order: networks are called in the order of the stock loop, where hooks may count their calls.
        """
        found = self._modules.changed(may_keep=True)
        return self._hooks.changed() if found is None and not in_order else found

    def changed_exactly(self) -> str | None:
        """The same, where no network is called: what functions read counts, too, and so does every tensor."""
        return next((name for each in self._all if (name := each.changed()) is not None), None)

    def restore(self, *, watching: bool = False) -> None:
        """Give modules, attention processors, functions in the place of `forward` and hooks back what they held.

        A network that counts its calls or keeps something from one for the next would otherwise begin the pipeline's
        own loop with what other calls have left. Random generators go back too. Tensors that were written to stay as
        they are.
        watching: also hooks that only watch. They are otherwise left with what they have seen of a check.
        """
        for each in self._all if watching else self._all[:3]:
            each.restore()
        for generator, state in self._random:
            generator.set_state(state)


class _Held:
    """Dictionaries, lists, sets, tensors and variables of functions, with what they held. moved: tensors are moved."""

    def __init__(self) -> None:
        self.tensors: list[tuple[str, Tensor | None]] = []
        self.generators: list[torch.Generator] = []
        self.moved = False
        self._seen: dict[int, Any] = {}  # by identity; held, so that no other object gets it
        self._names: list[str] = []
        self._live: list[Any] = []  # containers
        self._before: list[Any] = []  # a copy of each
        self._views: list[Any] = []
        self._attributes: list[tuple[Callable[[Any], tuple[Any, ...]], dict[str, Any]]] = []
        self._cells: list[tuple[str, CellType, Any]] = []
        self._globals: list[tuple[str, dict[str, Any], str, Any]] = []

    def add(self, name: str, container: Any, attributes: tuple[str, ...] = ()) -> None:
        """attributes: those that count, where the container is the dictionary of a module."""
        if attributes:
            self._attributes.append((operator.itemgetter("_modules", *attributes), container))
        elif container:  # live views: they are compared without a line of Python for each
            self._views.append(container.values() if isinstance(container, dict) else container)
        self._names.append(name)
        self._live.append(container)
        self._before.append(dict(container) if isinstance(container, dict) else container.copy())

    def look_into(self, name: str, value: Any, depth: int) -> None:
        """Hold a container or an object of a part, and those in it. depth: of objects in objects."""
        if type(value) in PLAIN:
            return
        if isinstance(value, Tensor):
            self.tensors.append((name, value))
            return
        if isinstance(value, torch.Generator):
            self.generators.append(value)
            return
        if not isinstance(value, _CONTAINERS):
            if not depth or isinstance(value, OPAQUE) or package_of(type(value)) == "torch":
                return
            value, depth = getattr(value, "__dict__", None), depth - 1
        if not isinstance(value, _CONTAINERS) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, list | dict | set):
            self.add(name, value)
        for part in list(value.values() if isinstance(value, dict) else value):
            self.look_into(name, part, depth)

    def look_behind(self, name: str, function: Any) -> None:
        """Hold what a function reads beside its arguments: its variables, its object, globals that it names."""
        if id(function) in self._seen:
            return
        self._seen[id(function)] = function
        if isinstance(function, functools.partial):
            self.look_into(name, (function.args, function.keywords), 1)
            self.look_behind(name, function.func)
        elif isinstance(function, MethodType):
            self._look_behind_value(name, function.__self__)
            self.look_behind(name, function.__func__)
        elif isinstance(function, FunctionType):
            for cell in function.__closure__ or ():
                with suppress(ValueError):  # the variable has no value yet
                    self._cells.append((name, cell, cell.cell_contents))
                    self._look_behind_value(name, cell.cell_contents)
            for each in global_names(function.__code__) & function.__globals__.keys():
                value = function.__globals__[each]
                if type(value) in PLAIN or isinstance(value, list | dict | set | Tensor):
                    self._globals.append((name, function.__globals__, each, value))
                    self.look_into(name, value, 1)
        else:
            self._look_behind_value(name, function)

    def _look_behind_value(self, name: str, value: Any) -> None:
        if isinstance(value, FunctionType | MethodType | functools.partial):
            self.look_behind(name, value)
        elif isinstance(value, (*_CONTAINERS, Tensor, torch.Generator)) or package_of(type(value)) not in KNOWN:
            self.look_into(name, value, 1)

    def complete(self) -> None:
        """All that is to be held was added."""
        self._empty = [each for each in self._live if not each]  # most tables of a module are
        self._filled = [each for each in self._live if each]
        self._lengths = list(map(len, self._filled))
        self._values = self._values_now()
        self.tensors = [each for each in self.tensors if _counts_writes(each[1])]
        self._counted: list[Any] = [tensor for _, tensor in self.tensors]
        self._writes = self._writes_now()

    def _values_now(self) -> list[Sequence[Any]]:
        """What the containers hold: the attributes of each module, and then what is in all the others."""
        return [*[getter(state) for getter, state in self._attributes], list(chain.from_iterable(self._views))]

    def _writes_now(self) -> list[int]:
        """Of every tensor, how often it was written to, and where it lies."""
        found = list(map(_version, self._counted))
        return found if self.moved else found + list(map(Tensor.data_ptr, self._counted))

    def is_same(self, same: Callable[[Any, Any], bool] = operator.eq) -> bool:
        """same: compares two lists of sequences. The same object is equal to itself, and not looked at."""
        try:
            return (
                not any(self._empty)
                and self._lengths == list(map(len, self._filled))
                and same(self._values_now(), self._values)
                and self._writes == self._writes_now()
                and all(cell.cell_contents is value for _, cell, value in self._cells)
                and all(names.get(each, ...) is value for _, names, each, value in self._globals)
            )
        except (RuntimeError, ValueError, KeyError):  # tensors are not the same; another thread adds or deletes
            return False

    def changed(self, *, may_keep: bool = False) -> str | None:
        """The name of a part that holds something else, or None. may_keep: tensors, see `ModuleState.changed`."""
        if self.is_same():
            return None
        for name, now, before in zip(self._names, self._live, self._before, strict=True):
            if (part := _difference(now.copy(), before, may_keep)) is not None:
                return f"{name}.{part}".rstrip(".")
        for name, cell, value in self._cells:
            try:
                if not _alike(cell.cell_contents, value):
                    return name
            except ValueError:
                return name
        for name, names, each, value in self._globals:
            if not _alike(names.get(each, ...), value):
                return name
        for number, (before, now) in enumerate(zip(self._writes, self._writes_now(), strict=True)):
            if before != now:
                return self.tensors[number % len(self.tensors)][0]
        return None

    def restore(self) -> None:
        for now, before in zip(self._live, self._before, strict=True):
            if not _is_held(now, before):  # compiled code also checks whether a dictionary was written to
                now.clear()
                now.extend(before) if isinstance(now, list) else now.update(before)
        for _, cell, value in self._cells:
            cell.cell_contents = value
        for _, names, each, value in self._globals:
            if names.get(each, ...) is not value:
                names[each] = value


def _counts_writes(tensor: Tensor | None) -> bool:
    if tensor is None or tensor.is_inference():
        return False
    try:
        return tensor.data_ptr() is not None
    except (RuntimeError, ValueError):  # several tensors in one, or one that is not made yet
        return False


def _is_held(now: Any, before: Any) -> bool:
    """Whether a container holds the same objects as its copy."""
    if isinstance(now, dict) and list(now) != list(before):
        return False
    return _identical(*(each.values() if isinstance(each, dict) else each for each in (now, before)))


def _identical(now: Any, before: Any) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _all_identical(now: Iterable[Sequence[Any]], before: Iterable[Sequence[Any]]) -> bool:
    return _identical(*(list(chain.from_iterable(each)) for each in (now, before)))


def _difference(now: Any, before: Any, may_keep: bool) -> str | None:
    """The name of what differs in two containers of one type, "" where it has none; None: nothing."""
    if not isinstance(now, dict):
        return None if _alike(now, before) else ""
    for key in now.keys() | before.keys():
        new, old = now.get(key, ...), before.get(key, ...)
        if not _alike(new, old) and not (may_keep and _is_kept(new, old)):
            return key if isinstance(key, str) else ""
    return None


def _is_kept(now: Any, before: Any) -> bool:
    """Whether these are tensors where there was nothing before, or tensors on another device."""
    new, old = tree_leaves(now), [] if before is ... else tree_leaves(before)
    old = [each for each in old if each is not None]
    if not new or not all(isinstance(each, Tensor) for each in (*new, *old)):
        return False
    return not old or (len(new) == len(old) and all(a.device != b.device for a, b in zip(new, old, strict=True)))


def _alike(now: Any, before: Any) -> bool:
    """The same object, or an equal value: layers of a LoRA multiply their scale by a number and divide it again."""
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, float):
        return math.isclose(now, before, rel_tol=1e-12)
    if isinstance(now, list | tuple):
        return len(now) == len(before) and all(map(_alike, now, before))
    if type(now) is dict:
        return now.keys() == before.keys() and all(_alike(now[each], before[each]) for each in now)
    return (type(now) in PLAIN or isinstance(now, MethodType | set | frozenset)) and bool(now == before)
