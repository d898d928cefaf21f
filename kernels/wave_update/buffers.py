"""What the updates of one run read and write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from srds_fast.errors import InvalidArgument

from ..checks import MOST_ELEMENTS, check_device, check_dtype, check_shape
from ..dispatch import implementation
from .table import WaveTable


class NetworkInput(NamedTuple):
    """How the network wants its rows.

    Attributes:
        dtype: of its input; None: of the state.
        branches: copies, one for each guidance branch; they lie in the batch as (branch, row, sample).
        channels_last: memory format, for states [samples, channels, height, width] or with depth.
    """

    dtype: torch.dtype | None = None
    branches: int = 1
    channels_last: bool = False

    def empty(self, rows: int, state: Tensor) -> Tensor:
        """Room for the input of these rows, [branches * rows, samples, ...]; state: one of them, [samples, ...]."""
        samples, *shape = state.shape
        return _empty(state, [self.branches * rows, samples], shape, self.dtype or state.dtype, self.channels_last)


AS_THE_STATE = NetworkInput()


class Scratch(NamedTuple):
    """What launches of one run share.

    Attributes:
        ticket: [1] int32, counts programs of a launch that are done; 0 between launches.
        partial: sums of the change, one a program.
        moved: `Buffers.moved` as bytes.
        elements: of a state of one sample.
        block: of them at a time.
        programs: side by side along a state.
        parts: the power of two that holds as many.
    """

    ticket: Tensor
    partial: Tensor
    moved: Tensor
    elements: int
    block: int
    programs: int
    parts: int


class Buffers:
    """The memory of a run and what is measured in it. Of one run only: runs side by side have their own.

    Args:
        table: the updates.
        x: starting noise, [samples, ...], of the table's dtype, device and number of dimensions; kept in slot 0.
        noises: [entries, samples, ...], the noise that the table refers to, as x.
        channels_last: lay the memory out as the network's input, so that both are read and written in order.

    Attributes:
        table: the same.
        implementation: what runs the updates.
        memory: [slots, samples, ...], what updates leave for later ones.
        slots: its slots, [samples, ...] each.
        rows: the same, as [1, samples, ...].
        noises: laid out as the memory.
        change: [iterations + 1, samples], mean |x^p - x^(p-1)| of the last boundary.
        moved: [iterations + 1, samples] bool, some boundary of the iteration differs from the one before by a bit.
        scratch: of the kernel, made with its first launch.

    Raises:
        InvalidArgument: x or noises do not fit the table.
    """

    def __init__(
        self, table: WaveTable, x: Tensor, noises: Tensor | None = None, *, channels_last: bool = False
    ) -> None:
        _check(table, x, noises)
        self.table = table
        self.implementation = implementation(x.device)
        self.memory = _empty(x, [table.num_slots, len(x)], x.shape[1:], x.dtype, channels_last)
        self.noises = None
        if noises is not None:
            self.noises = _empty(x, noises.shape[:2], noises.shape[2:], x.dtype, channels_last).copy_(noises)
        self.change = x.new_zeros(table.num_iterations + 1, len(x))
        self.moved = torch.zeros_like(self.change, dtype=torch.bool)
        self._look_at_memory()
        self.slots[0].copy_(x)

    def restart(self, x: Tensor, noises: Tensor | None = None) -> None:
        """Another run on the same memory: from x, with this noise; both as they were given at first."""
        self.slots[0].copy_(x)
        if noises is not None:
            assert self.noises is not None
            self.noises.copy_(noises)
        self.moved.zero_()

    def keep(self, running: Sequence[int]) -> None:
        """Go on with these positions of the samples only."""
        index = torch.tensor(running, device=self.memory.device)
        self.memory = _samples(self.memory, index)
        self.noises = None if self.noises is None else _samples(self.noises, index)
        self.change, self.moved = self.change.index_select(1, index), self.moved.index_select(1, index)
        self._look_at_memory()

    def noise_of(self, draw: int) -> Tensor:
        """An entry of the noise, [samples, ...]."""
        assert self.noises is not None
        return self.noises[draw]

    def _look_at_memory(self) -> None:
        self.slots, self.rows = self.memory.unbind(), self.memory.split(1)
        self.scratch: Scratch | None = None


def _check(table: WaveTable, x: Tensor, noises: Tensor | None) -> None:
    check_dtype("x", x, (table.dtype,))
    check_device("x", x, table.device)
    if x.ndim != table.ndim or x.numel() == 0:
        raise InvalidArgument(
            f"x has shape {tuple(x.shape)}. The table is for states [samples, ...] of {table.ndim} dimensions. "
            "Make a table for this shape."
        )
    elements = math.prod(x.shape[1:])
    if elements > MOST_ELEMENTS:
        raise InvalidArgument(f"x has {elements} elements a sample. The most is {MOST_ELEMENTS}. Split the samples.")
    if noises is not None:
        check_dtype("noises", noises, (table.dtype,))
        check_device("noises", noises, table.device)
        check_shape("noises", noises, (len(noises), *x.shape), "[entries, samples, ...]")
    if table.draws > (0 if noises is None else len(noises)):
        raise InvalidArgument(
            f"noises has {0 if noises is None else len(noises)} entries. The table refers to {table.draws}. "
            "Pass as many."
        )


def _samples(tensor: Tensor, index: Tensor) -> Tensor:
    """Some of the samples, in the memory format of all."""
    return torch.empty_like(tensor[:, : len(index)]).copy_(tensor.index_select(1, index))


def _empty(
    like: Tensor, leading: Sequence[int], shape: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """Room for [*leading, *shape], channels innermost if wanted and if there is space to put them in."""
    if not channels_last or len(shape) < 2:
        return like.new_empty(*leading, *shape, dtype=dtype)
    channels, *space = shape
    return like.new_empty(*leading, *space, channels, dtype=dtype).movedim(-1, len(leading))
