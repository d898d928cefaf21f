"""The arguments of a call of a modular pipeline: inputs of its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...caches import signature_of


def is_modular(pipe: Any) -> bool:
    """Whether it is a diffusers ModularPipeline. By name: an import of the class would cost other pipelines time."""
    return any(cls.__name__ == "ModularPipeline" for cls in type(pipe).__mro__)


def bind_modular(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs by name that the call gives or its `state` holds, without defaults.

    TypeError: the arguments do not fit the signature of a modular pipeline.
    """
    call = signature_of(type(pipe).__call__).bind(pipe, *args, **kwargs).arguments
    state = call.get("state")
    arguments: dict[str, Any] = dict(call.get("kwargs", {}))
    return arguments if state is None else state.values | arguments


def why_stock(pipe: Any, arguments: dict[str, Any]) -> str | None:
    """Why a call of a modular pipeline must run on its own loop, or None."""
    if arguments.get("callback_on_step_end") is not None:
        return "callback_on_step_end was given, which diffusers' own blocks of a modular pipeline do not call"
    for loop in _loops(pipe._blocks):
        for each in loop.loop_inputs:
            given = arguments.get(each.name)
            if each.name == "use_kv_cache" and (each.default if given is None else given):
                return "its network keeps keys and values of the first step for the others: pass use_kv_cache=False"
    return None


def _loops(block: Any) -> Iterator[Any]:
    if hasattr(block, "loop_inputs"):
        yield block
    for each in block.sub_blocks.values():
        yield from _loops(each)
