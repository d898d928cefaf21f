"""What the network is given, and what is made of its output before a sweep, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class NetworkInput(NamedTuple):
    """The format in which the network expects its rows."""

    dtype: torch.dtype | None = None  # None: that of the state
    branches: int = 1  # copies of each row, one per guidance branch. The batch is ordered as (branch, row, sample).
    channels_last: bool = False  # memory format, for states [samples, channels, height, width] or with depth

    def empty(self, rows: int, state: Tensor) -> Tensor:
        """An uninitialised input for so many rows, [branches * rows, samples, ...]; `state`: [samples, ...]."""
        samples, *shape = state.shape
        return empty(state, [self.branches * rows, samples], shape, self.dtype or state.dtype, self.channels_last)


AS_THE_STATE = NetworkInput()


def empty(
    like: Tensor, leading: Sequence[int], shape: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """An uninitialised tensor [*leading, *shape] on the device of `like`; shape: of one sample, [channels, ...]."""
    if not channels_last or len(shape) < 2:
        return like.new_empty(*leading, *shape, dtype=dtype)
    channels, *space = shape
    return like.new_empty(*leading, *space, channels, dtype=dtype).movedim(-1, len(leading))


def network_input(x: Tensor, positions: Tensor, scale: Tensor | None, network: NetworkInput) -> Tensor:
    """The network's input at the points at these positions, [branches * rows, samples, ...].

    x: points of the grid, [points, samples, ...]; scale: [points, 1, ...], what they are multiplied with; None: 1.
    """
    rows = x.index_select(0, positions)
    return as_input(rows if scale is None else rows * scale.index_select(0, positions), network)


def as_input(rows: Tensor, network: NetworkInput) -> Tensor:
    """The network's input at rows, [rows, samples, ...]: [branches * rows, samples, ...], perhaps the same tensor."""
    given = rows
    if network.dtype not in (None, given.dtype):
        given = given.to(network.dtype)
    if network.branches > 1:
        given = torch.cat([given] * network.branches)
    return network.empty(len(rows), rows[0]).copy_(given) if network.channels_last else given


def guided(m: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weighted sum of the guidance branches, [rows, samples, ...]; m: [branches * rows, samples, ...].

    Branches are nearly equal, and large weights nearly cancel. So differences to the first branch are weighted: their
    rounding is small, as in the usual `u + g * (c - u)`.
    """
    m = m.to(dtype)
    if guidance is None:
        return m
    first, *others = m.unflatten(0, (len(guidance), -1))
    of_first, *weights = guidance.unbind()
    found: Tensor = sum(weights, of_first) * first
    for weight, branch in zip(weights, others, strict=True):
        found = found + weight * (branch - first)
    return found
