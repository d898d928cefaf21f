"""The update in plain PyTorch, with a counter on the device instead of a number.

Every update runs the same operations: the host reads nothing, and no shape depends on the counter. So the operations
can be recorded once, in a CUDA graph or one by one, and replayed on the same tensors for all updates. They round as
`reference` does, to the bit: terms that an update lacks are computed and discarded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.network_input import NetworkInput
from . import reference
from .buffers import Buffers
from .columns import Columns
from .table import WaveTable


def wave_update(
    table: WaveTable,
    number: Tensor,
    buffers: Buffers,
    m: Tensor | None,
    guidance: Tensor | None,
    network: NetworkInput,
    out: Tensor | None,
) -> Tensor | None:
    """See `srds_fast.kernels.wave_update.wave_update`."""
    if not any(any(update) for update in table.updates):
        # the kernel is not launched for empty updates, so it does not count them
        return out
    # the last row of the padded table does nothing
    update = number.clamp(max=len(table.updates))
    number.add_(1)
    if table.most_rows:
        assert m is not None
        _step(table, update, buffers, reference.guided(m, guidance).to(table.dtype))
    _correct(table, update, buffers)
    if table.most_gathers:
        assert out is not None
        _gather(table, update, buffers, network, out)
    return out


def _step(table: WaveTable, update: Tensor, buffers: Buffers, m: Tensor) -> None:
    """Take the steps. m: [rows, samples, ...], branches summed; rows that no step reads may hold anything."""
    padded, memory = table.padded, buffers.memory
    keep, states, rows, before, draw = _of(padded.steps, update).unbind()
    is_taken, looks_back, has_noise = _of(padded.takes, update).unbind()
    a, b, c, p, q, d, s = _of(padded.numbers, update).unbind()
    columns = Columns(
        keep,
        states,
        rows,
        a if padded.scales_state else None,
        b if padded.adds_m else None,
        c if table.clip is not None else None,
        p,
        q,
        looks_back=[],
        noises=[],
        gathers=None,
        scale=None,
    )
    stepped = reference.step(columns, memory.index_select(0, states), m, table.clip)
    # addcmul rounds once, as add with alpha does
    if table.looks_back:
        stepped = torch.where(looks_back, torch.addcmul(stepped, d, memory.index_select(0, before)), stepped)
    if table.draws:
        assert buffers.noises is not None
        stepped = torch.where(has_noise, torch.addcmul(stepped, s, buffers.noises.index_select(0, draw)), stepped)
    memory.index_copy_(0, keep, torch.where(is_taken, stepped, memory.index_select(0, keep)))


def _correct(table: WaveTable, update: Tensor, buffers: Buffers) -> None:
    """Correct and compare, one correction after another."""
    padded, memory, change, moved = table.padded, buffers.memory, buffers.change, buffers.moved
    corrections, corrects = _of(padded.corrections, update).unbind(1), _of(padded.corrects, update).unbind(1)
    for each, does in zip(corrections, corrects, strict=True):
        slot, new, old, compare, iteration = each[:, None].unbind()
        has_bracket, is_compared, is_whole = does[:, None].unbind()
        value = memory.index_select(0, slot)
        corrected = value + (memory.index_select(0, new) - memory.index_select(0, old))
        value = torch.where(has_bracket, corrected, value)
        memory.index_copy_(0, slot, value)
        previous = memory.index_select(0, compare)
        # drop the leading dimension, so that the mean adds up in the order of the reference
        distance = (value - previous).abs()[0].flatten(1).mean(1)
        change.index_copy_(0, iteration, torch.where(is_whole, distance, change.index_select(0, iteration)))
        if table.records_moved:
            differs = is_compared & (value != previous).flatten(2).any(2)
            moved.index_copy_(0, iteration, moved.index_select(0, iteration) | differs)


def _gather(table: WaveTable, update: Tensor, buffers: Buffers, network: NetworkInput, out: Tensor) -> None:
    """Write the first rows of each branch."""
    padded = table.padded
    given = buffers.memory.index_select(0, _of(padded.slots, update))
    if padded.scaled:
        given = _of(padded.scale, update) * given
    rows = out.unflatten(0, (network.branches, -1))[:, : table.most_gathers]
    rows.copy_(torch.where(_of(padded.gathers, update), given.to(out.dtype), rows))


def _of(column: Tensor, update: Tensor) -> Tensor:
    """The entries of an update; update: [1]."""
    return column.index_select(0, update)[0]
