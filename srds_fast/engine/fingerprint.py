"""What a recording of a network depends on beside its arguments, to be compared before every replay.

A graph reads weights where they lay when it was recorded, and has the network's Python numbers, its branches and its
attention processors built in. Weights written in place are seen by a replay. All else that moves (a LoRA that is
loaded, switched or half loaded, a scale, a processor, FreeU) gives another fingerprint.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})
# what every module has: its parts are looked at as such, its hooks by `hooked`
_MACHINERY = frozenset(nn.Module().__dict__) - {"training"}


def fingerprint(network: nn.Module) -> Hashable:
    """Where the tensors of a network lie and what numbers, switches and processors its modules hold; equal for equals.

    It waits for nothing and copies nothing: a few milliseconds of the host for a network of a thousand modules.
    """
    found: list[Hashable] = []
    for module in network.modules():
        state = module.__dict__
        found.append(id(module))
        for tensors in (state["_parameters"], state["_buffers"]):
            for tensor in tensors.values():
                if tensor is not None:
                    found += (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        for name, value in state.items():
            if name not in _MACHINERY:
                found.append(value if type(value) in _PLAIN else _of_value(value))
    return tuple(found)


def _of_value(value: Any, deep: bool = True) -> Hashable:
    kind = type(value)
    if kind in _PLAIN:
        return value  # type: ignore[no-any-return]
    if isinstance(value, Tensor):
        return value.data_ptr(), value.dtype, value.shape, value.stride()
    if isinstance(value, list | tuple):
        return kind, *(_of_value(each, deep) for each in value)
    if isinstance(value, dict):
        return kind, *value.keys(), *(_of_value(each, deep) for each in value.values())
    if deep and not isinstance(value, nn.Module | type) and (held := getattr(value, "__dict__", None)):
        # an attention processor, a configuration: with settings of its own
        return id(value), *((name, _of_value(each, deep=False)) for name, each in held.items())
    return id(value)


def tensors_of(network: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a fingerprint looks at."""
    for module in network.modules():
        state = module.__dict__
        for name, value in (*state["_parameters"].items(), *state["_buffers"].items(), *state.items()):
            if name not in _MACHINERY:
                yield from _tensors_in(value)


def _tensors_in(value: Any, deep: bool = True) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors_in(each, deep)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors_in(each, deep)
    elif deep and not isinstance(value, nn.Module | type) and hasattr(value, "__dict__"):
        for each in vars(value).values():
            yield from _tensors_in(each, deep=False)


def hooked(network: nn.Module) -> str | None:
    """The name of a part of the network that a hook hangs on, or None: a replay would not call it."""
    for name, module in network.named_modules():
        state = module.__dict__
        # `forward` of its own: diffusers' and accelerate's hooks put themselves there
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
            return name or type(module).__name__
    return None
