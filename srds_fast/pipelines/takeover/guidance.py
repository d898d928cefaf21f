"""Guidance weights, computed from the loop's output for random network outputs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..networks import NetworkCall

# relative bound on the error of linear guidance in float64: rounding gives 1e-16, a half-precision cast 1e-3
LINEAR = 1e-9
MAX_CACHED = 64


@dataclass(frozen=True)
class GuidanceCache:
    """Guidance weights by kind of call. Finding them waits for the device; calls of a known kind do not wait.

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
        if self.kind is not None:
            for oldest in list(self.weights)[: 1 - MAX_CACHED]:
                self.weights.pop(oldest, None)
            self.weights[self.kind, states.dtype, states.device] = weights


def probe_of(call: NetworkCall, number: int, *, known: bool) -> Tensor:
    """Random float64 numbers in the shape of the network's output, from a generator seeded with the call's number.

    known: the guidance weights are known, so the values do not matter: return zeros.
    """
    config: Any = call.network.config
    shape = list(call.states.shape)
    shape[call.family.channels] = config.get("out_channels") or config["in_channels"]
    if known:
        return call.states.new_zeros(shape)
    generator = torch.Generator().manual_seed(number)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(call.states.device)


def weights_of(probes: Sequence[Tensor], m: Tensor) -> Tensor | None:
    """The weights w with m = sum of w_i * probe_i, [branches], on the CPU; None if m is no guided sum of the probes."""
    columns = torch.stack([each.flatten() for each in probes] + [m.flatten().double()])
    # all inner products in one transfer to the host
    products = (columns @ columns.T).cpu()
    branches = len(probes)
    weights: Tensor = torch.linalg.solve(products[:branches, :branches], products[:branches, branches])
    residual = columns[branches] - weights.to(columns) @ columns[:branches]
    # the weights of guidance add up to 1; otherwise the loop rescales by the values of the outputs, which is not linear
    deviation = abs(float(weights.sum()) - 1.0)
    is_sum = deviation <= LINEAR and float(residual.norm()) <= LINEAR * float(columns[branches].norm())
    return weights if is_sum else None
