"""Guidance weights, computed from the loop's output for random network outputs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..networks import Network

# relative bound on the error of linear guidance in float64: rounding gives 1e-16, a half-precision cast 1e-3
LINEAR = 1e-9
MAX_CACHED = 64


@dataclass(frozen=True)
class GuidanceCache:
    """Guidance weights by kind of call (LRU). Finding them waits for the device; calls of a known kind do not wait.

    Attributes:
        weights: known weights.
        kind: everything the weights of this call can depend on; None: do not use the cache.
    """

    weights: dict[Hashable, Tensor]
    kind: Hashable | None

    def get(self, states: Tensor) -> Tensor | None:
        """The weights for states like these, or None."""
        key = self.kind, states.dtype, states.device
        found = None if self.kind is None else self.weights.pop(key, None)
        if found is not None:
            self.weights[key] = found  # LRU: mark as most recent
        return found

    def put(self, states: Tensor, weights: Tensor) -> None:
        """Store the weights for later calls."""
        if self.kind is None:
            return
        for oldest in list(self.weights)[: max(0, len(self.weights) + 1 - MAX_CACHED)]:
            self.weights.pop(oldest, None)
        self.weights[self.kind, states.dtype, states.device] = weights


def probe_of(network: nn.Module, family: Network, states: Tensor, number: int, *, known: bool) -> Tensor:
    """Random float64 numbers in the shape of the network's output, from a separate generator.

    Args:
        known: the guidance weights are known, so the values do not matter: return zeros.
    """
    config: Any = network.config
    shape = list(states.shape)
    shape[family.channels] = getattr(config, "out_channels", None) or config.in_channels
    if known:
        return states.new_zeros(shape)
    generator = torch.Generator().manual_seed(number)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(states.device)
