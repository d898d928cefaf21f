"""The attention of a network: diffusers' backends and stock processors.

Two functions of diffusers are not used. `model.set_attention_backend` changes the backend of the whole process.
`enable_xformers_memory_efficient_attention` replaces the user's own processors, and it draws from the random generator
of the device, which changes the images.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from ...errors import InvalidArgument
from .hold import first_sentence, held, name_of

# each has a version for torch's attention (suffix "2_0") and one for xformers (prefix "XFormers")
_STOCK = ("AttnProcessor", "AttnAddedKVProcessor", "JointAttnProcessor")


def check_attention(name: str) -> None:
    """Check the name only; `attention_set` checks that the attention can run here.

    Raises:
        InvalidArgument: the name is not "auto", "sdpa" or one of diffusers' attention backends (such as "xformers").
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    if name not in ["auto", "sdpa", *(each.value for each in AttentionBackendName)]:
        raise InvalidArgument(
            f"attention is {name!r}. diffusers has no attention backend of that name. "
            "Pass 'auto', 'sdpa', 'xformers' or a value of diffusers' AttentionBackendName."
        )


def attention_set(network: Any, name: str, device: torch.device) -> AbstractContextManager[list[str]]:
    """Switch the attention and restore it after the block; yields reasons for what was not switched."""
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else network.dtype
    if dtype.itemsize == 1:  # a storage dtype: diffusers converts the weights before it uses them
        dtype = torch.bfloat16
    head_dims = {each.inner_dim // each.heads for each in _modules(network) if hasattr(each, "inner_dim")}
    try:
        for head_dim in sorted(head_dims) or [64]:
            _try_backend(_backend(name), head_dim, dtype, device)
    except Exception as why:  # attention libraries raise errors of many types
        return nullcontext([f"attention={name!r} cannot be used: {first_sentence(why)}"])
    return held(network, "attention", name, _switch)


@functools.cache
def _try_backend(backend: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compute one small attention. The cache remembers a success, not a failure."""
    from diffusers.models import attention_dispatch

    name = attention_dispatch.AttentionBackendName(backend)
    attention_dispatch._check_attention_backend_requirements(name)
    attention_dispatch._maybe_download_kernel_for_backend(name)
    x = torch.zeros(1, 16, 2, head_dim, dtype=dtype, device=device)
    with torch.no_grad():
        attention_dispatch.dispatch_attention_fn(x, x, x, backend=name)


def _switch(network: nn.Module, name: str, undo: ExitStack) -> list[str]:
    from diffusers.models.attention_dispatch import AttentionBackendName

    unchanged = set()
    for module in _modules(network):
        if hasattr(module.processor, "_attention_backend"):
            owner, attribute, value = module.processor, "_attention_backend", AttentionBackendName(_backend(name))
        else:
            owner, attribute, value = module, "processor", _equivalent(module, _backend(name))
        if value is None:
            unchanged.add(type(module.processor).__name__)
        else:
            undo.callback(setattr, owner, attribute, getattr(owner, attribute))
            setattr(owner, attribute, value)
    if not unchanged:
        return []
    return [f"attention={name!r} was left out where {name_of(network)} has {', '.join(sorted(unchanged))}"]


def _equivalent(module: Any, backend: str) -> object | None:
    """The stock processor that computes the same with this backend, or None."""
    from diffusers.models import attention_processor as stock

    kind = type(module.processor)
    family = kind.__name__.removeprefix("XFormers").removesuffix("2_0")
    # a user's subclass of a stock processor may compute something else
    if family not in _STOCK or getattr(stock, kind.__name__, None) is not kind:
        return None
    if backend == "xformers":
        return _shared(getattr(stock, f"XFormers{family}"))
    # torch's processors always scale the queries
    return _shared(getattr(stock, f"{family}2_0")) if backend == "native" and module.scale_qk else None


@functools.cache
def _shared(kind: type) -> object:
    """One object for all calls: compiled code and captured graphs are valid for one object only."""
    return kind()


def _backend(name: str) -> str:
    return "native" if name == "sdpa" else name


def _modules(network: nn.Module) -> list[Any]:
    return [each for each in network.modules() if hasattr(each, "set_processor") and hasattr(each, "processor")]
