"""The memory that the updates of one run read and write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from srds_fast.errors import InvalidArgument
from srds_fast.words import counted

from ..common.checks import MOST_ELEMENTS, check_tensor
from ..common.clamping import Threshold
from ..common.dispatch import implementation
from ..common.network_input import empty
from .table import WaveTable


class Scratch(NamedTuple):
    ticket: Tensor  # [1] int32, counts the programs of a launch that are done; 0 between launches
    partial: Tensor  # sums of the change, one per program
    block: int  # elements that a program takes at a time
    programs: int  # side by side along a state


class Buffers:
    """The memory of one run and the measurements in it. Concurrent runs each need their own.

    x: starting noise, [samples, ...], kept in slot 0; noises: [entries, samples, ...], what the table refers to; both
    with the table's dtype and device, or InvalidArgument is raised. channels_last: lay out the memory as the network's
    input is, so that both are read and written in order.

    Attributes:
        memory: [slots, samples, ...], what updates leave for later ones.
        slots, rows: views of its slots, [samples, ...] and [1, samples, ...] each.
        change: [entries, samples], mean |x^p - x^(p-1)| of the boundaries that are measured.
        moved: [iterations + 1, samples] bool, whether any boundary of the iteration differs from the one before.
    """

    def __init__(
        self, table: WaveTable, x: Tensor, noises: Tensor | None = None, *, channels_last: bool = False
    ) -> None:
        _check(table, x, noises)
        self.table, self.noises, self._channels_last = table, noises, channels_last
        # the kernel knows no more than one element of a sample at a time
        self.implementation = "torch" if isinstance(table.clip, Threshold) else implementation(x.device)
        self.memory = empty(x, [table.num_slots, len(x)], x.shape[1:], x.dtype, channels_last)
        if noises is not None:  # laid out as the memory
            self.noises = empty(x, noises.shape[:2], noises.shape[2:], x.dtype, channels_last).copy_(noises)
        self.change = x.new_zeros(table.num_changes, len(x))
        self.moved = torch.zeros(table.num_iterations + 1, len(x), dtype=torch.bool, device=x.device)
        self._view_memory()
        self.slots[0].copy_(x)

    def keep(self, running: Sequence[int]) -> None:
        """Continue with the samples at these positions only."""
        index = torch.tensor(running, device=self.memory.device)
        self.memory = _samples(self.memory, index)
        self.noises = None if self.noises is None else _samples(self.noises, index)
        self.change, self.moved = self.change.index_select(1, index), self.moved.index_select(1, index)
        self._view_memory()

    def grow(self, table: WaveTable) -> None:
        """Go on with the updates of another table, which find in the same slots what those before have left."""
        memory, change = self.memory, self.change
        if table.num_slots > len(memory):
            slots = [table.num_slots, memory.shape[1]]
            self.memory = empty(memory, slots, memory.shape[2:], memory.dtype, self._channels_last)
            self.memory[: len(memory)] = memory
        if table.num_changes > len(change):
            more = table.num_changes - len(change)
            self.change = torch.cat([change, change.new_zeros(more, change.shape[1])])
        self.table = table
        self._view_memory()

    def _view_memory(self) -> None:
        self.slots, self.rows = self.memory.unbind(), self.memory.split(1)
        self.scratch: Scratch | None = None  # of the kernel, made at its first launch


def _check(table: WaveTable, x: Tensor, noises: Tensor | None) -> None:
    check_tensor("x", x, (table.dtype,), table.device)
    if x.ndim != table.ndim or x.numel() == 0:
        raise InvalidArgument(
            f"x has shape {tuple(x.shape)}. The table is for states [samples, ...] of {table.ndim} dimensions. "
            "Make a table for this shape."
        )
    elements = math.prod(x.shape[1:])
    if elements > MOST_ELEMENTS:
        raise InvalidArgument(
            f"x has {counted(elements, 'element')} a sample. The most is {MOST_ELEMENTS}. Split the samples."
        )
    entries = 0 if noises is None else len(noises)
    if noises is not None:
        check_tensor("noises", noises, (table.dtype,), table.device, (entries, *x.shape), "[entries, samples, ...]")
    if table.draws > entries:
        raise InvalidArgument(
            f"noises has {counted(entries, 'entry', 'entries')}. The table refers to {table.draws}. Pass as many."
        )


def _samples(tensor: Tensor, index: Tensor) -> Tensor:
    """The samples at these indices, in the memory format of the whole."""
    return torch.empty_like(tensor[:, : len(index)]).copy_(tensor.index_select(1, index))
