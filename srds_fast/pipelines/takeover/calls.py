"""The network calls of a turn of the loop, to be repeated for rows."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from ...engine.merging.rule import Call, is_list
from ...sampling.rows import state_dtype
from ..lockstep.turns import Ran
from .roles import Answer, ByStep, Column, Inferred, Joined, Pattern, Shared, State, Variant

Arguments = dict[int | str, Any]  # of a network call, by position or name

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)
# the arguments by which loops scale the layers of a LoRA
SCALING = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
# numbers that a ControlNet multiplies with: given as tensors, a recording serves all their values
FACTORS = ("conditioning_scale",)


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


def bound(inferred: Inferred, turns: Mapping[int, Ran], weights: torch.dtype) -> list[Calls]:
    """The calls of each variant, from turns of the steps that show them. weights: their dtype."""
    found = []
    for variant in inferred.variants:
        ran = turns[variant.steps[0]]
        x = ran.x[: len(ran.x) // inferred.copies]
        trees = {step: [arguments_of(call) for call in turns[step].calls] for step in variant.shown_by}
        first = trees[variant.steps[0]]
        calls = [
            _bound(call.network, pattern, first[number], {step: each[number] for step, each in trees.items()}, x)
            for number, (call, pattern) in enumerate(zip(ran.calls, variant.calls, strict=True))
        ]
        found.append(Calls(variant, calls, variant.weights.to(x.device, weights)))
    return found


def arguments_of(call: Call) -> Arguments:
    """The arguments of a call, by position or name, as they were when it was made: loops reuse dictionaries."""
    args, kwargs = tree_unflatten(*call.flat)
    return {**dict(enumerate(args)), **kwargs}


def parts_of(call: Call) -> list[Any]:
    """The leaves of `arguments_of`, without putting the arguments together once more."""
    return [part for leaf in call.flat[0] for part in (leaf if is_list(leaf) else [leaf])]


def parts(value: Tensor, x: Tensor) -> Iterator[tuple[Joined | None, Tensor, Tensor | None]]:
    """Parts of an argument that may be the state x, and what is joined to each."""
    other = [dim for dim in range(1, x.ndim) if value.shape[dim] != x.shape[dim]]
    if not other:
        yield None, value, None
    if len(other) == 1 and value.shape[other[0]] > x.shape[other[0]]:
        (dim,) = other
        size, more = x.shape[dim], value.shape[dim] - x.shape[dim]
        yield Joined(dim, state_first=True), value.narrow(dim, 0, size), value.narrow(dim, size, more)
        yield Joined(dim, state_first=False), value.narrow(dim, more, size), value.narrow(dim, 0, more)


def _bound(
    network: Any,
    pattern: Pattern,
    arguments: Arguments,
    by_step: Mapping[int, Arguments],
    x: Tensor,
) -> NetworkCall:
    fixed, moving = Arguments(), Arguments()
    states: list[Tensor] = []

    def on_device(number: float) -> Tensor:
        return torch.tensor(number, dtype=state_dtype(x.dtype), device=x.device)

    def moved(role: Any, value: Any, others: list[tuple[int, Any]]) -> Any:
        if isinstance(role, dict):
            return {key: moved(role[key], value[key], [(step, each[key]) for step, each in others]) for key in role}
        if isinstance(role, list | tuple):
            return [moved(each, value[key], [(step, of[key]) for step, of in others]) for key, each in enumerate(role)]
        if isinstance(role, State):
            _, state, rest = next(each for each in parts(value, x) if each[0] == role.joined)
            states.append(state)
            return rest
        if isinstance(role, ByStep):
            tensors = dict(others)
            return [tensors.get(like) for like in role.like]
        return None if isinstance(role, Column | Answer) else value

    for name, roles in pattern.roles.items():
        if all(isinstance(role, Shared) for role in tree_leaves(roles)):
            value = arguments[name]
            fixed[name] = tree_map_only(float, on_device, value) if name in FACTORS else value
        else:
            moving[name] = moved(roles, arguments[name], [(step, each[name]) for step, each in by_step.items()])
    return NetworkCall(network, pattern, fixed, moving, len(states[0]), states[0].dtype)


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


def unscaled(call: NetworkCall) -> tuple[NetworkCall, float]:
    """The call without the factor that it applies to the scales of LoRA layers, and the factor."""
    for name in SCALING:
        for given in (call.fixed, call.moving):
            if "scale" in (given.get(name) or {}):
                without: Arguments = {**given, name: {**given[name], "scale": 1.0}}
                changed = replace(call, fixed=without) if given is call.fixed else replace(call, moving=without)
                return changed, given[name]["scale"]
    return call, 1.0


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
