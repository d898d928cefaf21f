"""Recorded calls from the turns of a pipeline's loop that show them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from ...engine.merging.rule import Call, is_list
from ...sampling.recorded.calls import Arguments, Calls, NetworkCall
from ...sampling.recorded.roles import Answer, ByStep, Column, Inferred, Joined, Pattern, Shared, State
from ...sampling.rows import state_dtype
from ..lockstep.turns import Ran

# numbers that a ControlNet multiplies with: given as tensors, a recording serves all their values
FACTORS = ("conditioning_scale",)


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
        found.append(Calls(variant, calls, in_dtype(variant.weights, weights).to(x.device)))
    return found


def in_dtype(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of branches, [N, branches], in a dtype: their sums, most often 1, are not off by the rounding of each."""
    found = weights.to(dtype)
    found[:, 0] = weights.sum(1) - found[:, 1:].double().sum(1)
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
