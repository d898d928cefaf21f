"""The format of the network's input."""

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
