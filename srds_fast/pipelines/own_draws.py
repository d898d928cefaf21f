"""Calls beside those of a user (warm-ups, plans, timed loops) with random numbers of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..caches import signature_of
from ..schedulers.private_draws import PrivateDraws
from .hooks import execution_device
from .modular.arguments import is_modular
from .state import PipelineCall, RandomState


def with_own_draws(
    call: PipelineCall, random: RandomState | None = None
) -> tuple[tuple[Any, ...], dict[str, Any], PrivateDraws | None]:
    """The arguments of a call with copies of the caller's generators, and a context for draws that name none.

    The context is None where it would spoil what the caller has compiled: torch compiles such code anew for a context
    like this. Draws without a generator are then given one as an argument, if the pipeline takes any.

    random: where the copies begin; None: where the generators are.
    """
    draws = PrivateDraws(None if random is None else random.shared)
    fast, given = call.fast, call.arguments.get("generator")
    generators: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    # one that is given twice stays one
    copies = {id(each): each.clone_state() for each in generators if isinstance(each, torch.Generator)}
    for each, state in [] if random is None else random.given:
        copies[id(each)].set_state(state)
    own = [copies.get(id(each), each) for each in generators]
    if copies:
        generator = own if isinstance(given, list | tuple) else own[0]
        return *_with_generator(call, generator), None if any(_compiled(fast)) else draws
    if given is None and _takes_generator(fast) and any(_compiled(fast)):
        return *_with_generator(call, draws.of(execution_device(fast))), None
    return call.args, call.kwargs, draws


def _takes_generator(fast: Any) -> bool:
    return is_modular(fast.original) or "generator" in signature_of(type(fast.original).__call__).parameters


def _with_generator(call: PipelineCall, generator: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    fast, args, kwargs = call.fast, call.args, call.kwargs
    if args and "generator" not in kwargs and not is_modular(fast.original):
        place = list(signature_of(type(fast.original).__call__).parameters).index("generator") - 1
        if place < len(args):
            return (*args[:place], generator, *args[place + 1 :]), kwargs
    return args, {**kwargs, "generator": generator}


def _compiled(fast: Any) -> Iterator[bool]:
    """For each part of a pipeline and what was set on it: whether the user has compiled it."""
    for part in vars(fast).values():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            held = vars(module)
            yield held.get("_compiled_call_impl") is not None or "_orig_mod" in module._modules
            yield any(hasattr(each, "_torchdynamo_orig_callable") for each in held.values() if callable(each))
