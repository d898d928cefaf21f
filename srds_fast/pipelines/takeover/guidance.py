"""Guidance weights, read from what the pipeline's loop makes of random network outputs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..networks import Network

# of what guidance makes of random float64 numbers, relative: rounding leaves 1e-16, a half-precision detour 1e-3
LINEAR = 1e-9
MOST_KNOWN = 64


@dataclass(frozen=True)
class KnownGuidance:
    """Guidance weights by kind of call. To find them waits for the device once; calls of a known kind do not.

    Attributes:
        weights: what was found.
        kind: all that the weights of this call can depend on; None: they are found anew.
    """

    weights: dict[Hashable, Tensor]
    kind: Hashable | None

    def of(self, states: Tensor) -> Tensor | None:
        """The weights for states like these, or None."""
        key = self.kind, states.dtype, states.device
        found = None if self.kind is None else self.weights.pop(key, None)
        if found is not None:
            self.weights[key] = found  # the one used last goes last
        return found

    def keep(self, states: Tensor, weights: Tensor) -> None:
        """Remember them."""
        if self.kind is None:
            return
        for oldest in list(self.weights)[: max(0, len(self.weights) + 1 - MOST_KNOWN)]:
            self.weights.pop(oldest, None)
        self.weights[self.kind, states.dtype, states.device] = weights


def probe_of(network: nn.Module, family: Network, states: Tensor, number: int, *, known: bool) -> Tensor:
    """Random numbers in the shape of the network's output, in float64 and from a generator of their own.

    Args:
        known: they need not tell anything; any numbers do.
    """
    config: Any = network.config
    shape = list(states.shape)
    shape[family.channels] = getattr(config, "out_channels", None) or config.in_channels
    if known:
        return states.new_zeros(shape)
    generator = torch.Generator().manual_seed(number)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(states.device)
