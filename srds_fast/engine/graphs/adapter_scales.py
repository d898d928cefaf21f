"""LoRA scales as tensors: a recording reads them from the device, so a new scale needs no new recording."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class AdapterScales:
    """The scales of all LoRA layers of some networks. PEFT keeps one number per layer and adapter.

    networks: maps each network to the factor of this call: "scale" in `cross_attention_kwargs` or similar.
    """

    def __init__(self, networks: Mapping[nn.Module, float]) -> None:
        self._entries: list[tuple[dict[str, Any], str, float]] = [
            (scaling, name, factor)
            for network, factor in networks.items()
            for module in network.modules()
            if isinstance(scaling := getattr(module, "scaling", None), dict) and hasattr(module, "scale_layer")
            for name in scaling
        ]
        # PEFT's dictionaries, whose numbers `read_from` replaces by tensors
        self.dictionaries = frozenset(id(scaling) for scaling, _, _ in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def values(self, like: Tensor) -> Tensor:
        """The scales of this call, [entries], with the dtype and device of `like`."""
        return torch.tensor(
            [scaling[name] * factor for scaling, name, factor in self._entries], dtype=torch.float32, device="cpu"
        ).to(like)

    @contextmanager
    def read_from(self, values: Tensor) -> Iterator[None]:
        """In the block, the layers read their scales from this tensor, [entries]."""
        numbers = [scaling[name] for scaling, name, _ in self._entries]
        tensors = values.unbind()
        try:
            for (scaling, name, _), tensor in zip(self._entries, tensors, strict=True):
                scaling[name] = tensor
            yield
        finally:
            for (scaling, name, _), tensor, number in zip(self._entries, tensors, numbers, strict=True):
                if scaling.get(name) is tensor:  # otherwise the user has set another scale in the meantime
                    scaling[name] = number
