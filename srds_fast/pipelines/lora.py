"""LoRA scales as tensors: a recording reads them from the device, so that another scale needs no other recording."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class AdapterScales:
    """The scales of all LoRA layers of some networks. PEFT keeps one number for each layer and adapter.

    Args:
        networks: with what a call multiplies their scales by: the "scale" of its `cross_attention_kwargs` or the like.
    """

    def __init__(self, networks: Mapping[nn.Module, float]) -> None:
        self._entries = [
            (scaling, name, factor)
            for network, factor in networks.items()
            for scaling in _scalings(network)
            for name in scaling
        ]

    def __len__(self) -> int:
        return len(self._entries)

    def values(self, like: Tensor) -> Tensor:
        """The scales of this call, [entries], of the dtype and on the device of `like`."""
        return torch.tensor([scaling[name] * factor for scaling, name, factor in self._entries]).to(like)

    @contextmanager
    def read_from(self, values: Tensor) -> Iterator[None]:
        """Within it, layers take their scales from this tensor, [entries]."""
        numbers = [scaling[name] for scaling, name, _ in self._entries]
        tensors = values.unbind()
        try:
            for (scaling, name, _), tensor in zip(self._entries, tensors, strict=True):
                scaling[name] = tensor
            yield
        finally:
            for (scaling, name, _), tensor, number in zip(self._entries, tensors, numbers, strict=True):
                if scaling.get(name) is tensor:  # nobody has set another scale meanwhile
                    scaling[name] = number


def scale_numbers(networks: Iterable[nn.Module]) -> frozenset[int]:
    """The dictionaries, by identity, whose numbers `AdapterScales` takes from a tensor."""
    return frozenset(id(scaling) for network in networks for scaling in _scalings(network))


def _scalings(network: nn.Module) -> Iterator[dict[str, Any]]:
    for module in network.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and hasattr(module, "scale_layer"):
            yield scaling
