"""The network calls of a turn of a loop, to be repeated for rows: what they are made of, and what they depend on."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .roles import Pattern, Variant

Arguments = dict[int | str, Any]  # of a network call, by position or name

# the arguments by which loops scale the layers of a LoRA
SCALING = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


@dataclass(frozen=True, eq=False)
class NetworkCall:
    """One network call of a turn.

    fixed: arguments that are the same for all rows, by position or name. moving: the others, with tensors in the places
    of `PerSample`, lists of tensors, one a step, in those of `ByStep`, what is joined to it in that of `State`, and
    nothing in those of other roles. length: entries of the state, [branches * batch].
    """

    network: nn.Module
    pattern: Pattern
    fixed: Arguments
    moving: Arguments
    length: int
    dtype: torch.dtype  # of the state that it is given


@dataclass(frozen=True, eq=False)
class Calls:
    """The calls of the steps of a variant. weights: [N, branches], on the device."""

    variant: Variant
    calls: Sequence[NetworkCall]
    weights: Tensor


def kind_of(call: NetworkCall) -> Hashable:
    """Everything the cost of a call depends on: the network, and the shapes and dtypes of its arguments."""
    shapes = tuple((path, value.shape, value.dtype) for path, value in _leaves_of([call]) if isinstance(value, Tensor))
    return weakref.ref(call.network), call.length, call.dtype, shapes


def conditions_of(call: NetworkCall) -> Hashable:
    """Numbers among the arguments of a call, such as an embedded guidance scale, and the shapes of its tensors."""
    found: list[Hashable] = []
    for path, value in _leaves_of([call]):
        if isinstance(value, Tensor):
            number = value.ndim < 2 and value.is_floating_point()
            held = tuple(value.flatten().tolist()) if number else None
            found.append((path, tuple(value.shape), str(value.dtype), held))
        else:
            found.append((path, value if isinstance(value, _PLAIN) else type(value).__name__))
    return call.length, tuple(found)


def tensors_of(calls: Iterable[NetworkCall]) -> dict[str, Tensor]:
    """The tensors among the arguments of calls, by the path where each first occurs."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, value in _leaves_of(calls):
        if isinstance(value, Tensor):
            found.setdefault(id(value), (path, value))
    return dict(found.values())


def with_tensors(
    variants: Iterable[Calls], tensors: Mapping[str, Tensor], substitutes: Mapping[str, Tensor]
) -> list[Calls]:
    """The calls with these tensors replaced by the substitutes of the same names."""
    by_id = {id(tensor): substitutes[name] for name, tensor in tensors.items()}

    def substituted(call: NetworkCall) -> NetworkCall:
        fixed, moving = tree_map_only(Tensor, lambda tensor: by_id.get(id(tensor), tensor), (call.fixed, call.moving))
        return replace(call, fixed=fixed, moving=moving)

    return [replace(each, calls=[substituted(call) for call in each.calls]) for each in variants]


def unscaled(call: NetworkCall) -> tuple[NetworkCall, float]:
    """The call without the factor that it applies to the scales of LoRA layers, and the factor."""
    for name in SCALING:
        for given in (call.fixed, call.moving):
            if "scale" in (given.get(name) or {}):
                without: Arguments = {**given, name: {**given[name], "scale": 1.0}}
                changed = replace(call, fixed=without) if given is call.fixed else replace(call, moving=without)
                return changed, given[name]["scale"]
    return call, 1.0


def signature_of(calls: Iterable[NetworkCall]) -> Hashable:
    """Everything in calls that a recording depends on, except for the contents of their tensors.

    A ValueError names an argument that is an object of unknown contents.
    """
    first: dict[int, str] = {}
    found: list[Hashable] = [(id(call.network), call.length, call.dtype, call.pattern.signature) for call in calls]
    for path, value in _leaves_of(calls):
        if isinstance(value, Tensor):
            found.append((path, first.setdefault(id(value), path)))  # two arguments may be one tensor
        elif isinstance(value, _PLAIN):
            found.append((path, type(value), value))
        else:
            raise ValueError(f"{path.partition('.')[2]} is a {type(value).__name__}, an object of unknown contents")
    return tuple(found)


def _leaves_of(calls: Iterable[NetworkCall]) -> Iterator[tuple[str, Any]]:
    """The values in arguments by path, without the states and what the step decides, which differ between rows."""
    for number, call in enumerate(calls):
        for name, value in (*call.fixed.items(), *call.moving.items()):
            yield from _leaves(f"{number}.{name}", value)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(f"{path}.{key}", each)
    elif isinstance(value, list | tuple):
        yield path, len(value)
        for index, each in enumerate(value):
            yield from _leaves(f"{path}.{index}", each)
    else:
        yield path, value
