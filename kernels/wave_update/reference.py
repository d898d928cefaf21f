"""The update in plain PyTorch: one batched formula for all steps of the wave, and one addition per further term."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.clamping import Clip, clamped
from ..common.network_input import NetworkInput, as_input, guided
from .buffers import Buffers
from .columns import Columns
from .table import WaveTable


def wave_update(
    table: WaveTable, number: int, buffers: Buffers, m: Tensor | None, guidance: Tensor | None, network: NetworkInput
) -> Tensor | None:
    """See `srds_fast.kernels.wave_update.wave_update`."""
    update, columns = table.updates[number], table.columns[number]
    memory, slots, rows = buffers.memory, buffers.slots, buffers.rows
    stepped = None
    if table.num_rows[number]:
        assert m is not None
        if guidance is not None:
            m = guided(m, guidance, memory.dtype)
        elif m.dtype != memory.dtype:  # here and below: even a conversion of nothing takes half a microsecond
            m = m.to(memory.dtype)
        if columns.single is None:
            stepped = step(columns, memory.index_select(0, columns.states), m, table.clip)
            memory.index_copy_(0, columns.keep, stepped)
        else:
            keep, state = columns.single
            stepped = step(columns, rows[state], m, table.clip)
            rows[keep].copy_(stepped)
    for keep, before, d in columns.looks_back:
        slots[keep].add_(slots[before], alpha=d)
    for keep, draw, s in columns.noises:
        assert buffers.noises is not None
        slots[keep].add_(buffers.noises[draw], alpha=s)
    for slot, bracket, compare, iteration, change in update.corrections:
        if bracket is not None:
            new, old = bracket
            slots[slot].add_(slots[new] - slots[old])
        if compare is not None and change is not None:
            torch.mean((slots[slot] - slots[compare]).abs().flatten(1), 1, out=buffers.change[change])
        if compare is not None and table.records_moved:
            buffers.moved[iteration] |= (slots[slot] != slots[compare]).flatten(1).any(1)
    if not update.gathers:
        return None
    gathered = stepped if columns.gathers is None else memory.index_select(0, columns.gathers)
    assert gathered is not None, "without slots to gather, the update has steps"
    return as_input(gathered if columns.scale is None else columns.scale * gathered, network)


def step(columns: Columns, x: Tensor, m: Tensor, clip: Clip | None) -> Tensor:
    """a x + b m + c clamp(p x + q m) of all steps; x: their states, [steps, samples, ...]; m: [rows, samples, ...]."""
    if columns.rows is not None:
        m = m.index_select(0, columns.rows)
    stepped = x if columns.a is None else columns.a * x
    if columns.b is not None:
        stepped = stepped + columns.b * m
    if columns.c is not None:
        stepped = stepped + columns.c * clamped(columns.p * x + columns.q * m, clip)
    return stepped
