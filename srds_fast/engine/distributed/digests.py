"""Digests of what a call is given: equal on two ranks if they were given the same."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..._version import __version__

# pieces of a tensor that are hashed one by one: the hash of a piece does not see the order of its elements
PIECES = 64

_weights: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def versions() -> dict[str, str]:
    return {"version of srds_fast": __version__, "version of torch": torch.__version__}


def digest(value: Any) -> str:
    """By value: of numbers, texts, tensors, arrays, images, random generators and containers of these; else by type."""
    return hashlib.sha256(repr(_known(value)).encode()).hexdigest()[:16]


def hashed(text: str) -> int:
    """A number of 52 bits, which the value of a header holds exactly."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16)


def digest_of_weights(networks: Iterable[nn.Module]) -> str:
    """Of the names, shapes and values of all parameters and buffers.

    Made anew only if a tensor was replaced or written. Torch does not tell of values that are written in place through
    `tensor.data`.
    """
    return digest([_weights_of(each) for each in networks])


def _weights_of(network: nn.Module) -> str:
    held = [tensor for module in network.modules() for tensor in _tensors_of(module)]
    state = tuple(map(_state_of, held))
    kept = _weights.get(network)
    if kept is None or kept[0] != state or any(each.is_inference() for each in held):
        named = sorted(dict([*network.named_parameters(), *network.named_buffers()]).items())
        kept = _weights[network] = state, digest([(name, _of_tensor(each)) for name, each in named])
    return kept[1]


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers that a module holds itself; to read their names too takes longer."""
    held = (*module._parameters.values(), *module._buffers.values())
    return [each for each in held if each is not None]


def _state_of(tensor: Tensor) -> tuple[Any, ...]:
    """Changes when another tensor, or memory, takes its place, and when it is written.

    Tensors of the inference mode do not tell of the latter. Some subclasses have no memory of their own.
    """
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), version, tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else tensor.device


@torch.no_grad()
def _of_tensor(tensor: Tensor) -> Any:
    if tensor.is_meta or tensor.layout is not torch.strided:
        return str(tensor.dtype), tuple(tensor.shape)
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.element_size() == 1:
        flat = flat.view(torch.uint8)
    # one transfer to the host
    hashes = torch.stack([torch.hash_tensor(each) for each in flat.chunk(PIECES)]) if len(flat) else flat
    return str(tensor.dtype), tuple(tensor.shape), hashes.tolist()


def _known(value: Any) -> Any:
    if isinstance(value, bool | int | float | complex | str | bytes | type(None) | torch.dtype | torch.device):
        return value
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, torch.Generator):
        return "generator", hashlib.sha256(bytes(value.get_state().tolist())).hexdigest()
    if isinstance(value, Mapping):
        return [(str(key), _known(each)) for key, each in value.items()]
    if isinstance(value, list | tuple):
        return [_known(each) for each in value]
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if callable(to_bytes := getattr(value, "tobytes", None)):  # of arrays and images
        return type(value).__name__, str(getattr(value, "size", "")), hashlib.sha256(to_bytes()).hexdigest()
    return type(value).__qualname__
