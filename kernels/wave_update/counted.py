"""The update in plain PyTorch, with a counter on the device in place of a number.

What one call runs is the same for every update: nothing is read by the host, and no shape depends on the counter. The
operations can be recorded once, in a CUDA graph or one by one, and run again on the same tensors for all updates.
Rounding is that of `reference`, to the bit: terms that an update lacks are computed and not taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .batched import Batch
from .buffers import Buffers, NetworkInput
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
        # the kernel is not launched for nothing, and does not count then
        return out
    # beyond the last update stands one that does nothing
    update = number.clamp(max=len(table.updates))
    number.add_(1)
    if table.most_rows:
        assert m is not None
        _make(table, update, buffers, reference.guided(m, guidance).to(table.dtype))
    _sum(table, update, buffers)
    if table.most_entering:
        assert out is not None
        _enter(table, update, buffers, network, out)
    return out


def _make(table: WaveTable, update: Tensor, buffers: Buffers, m: Tensor) -> None:
    """Make values from m, [rows, samples, ...], with the branches summed; rows that are not named may hold anything."""
    padded, memory = table.padded, buffers.memory
    keep, states, rows, before, draw = _of(padded.made, update).unbind()
    is_made, looks_back, has_noise = _of(padded.makes, update).unbind()
    a, b, c, p, q, d, s = _of(padded.numbers, update).unbind()
    batch = Batch(
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
        entering=None,
        scale=None,
    )
    made = reference.make(batch, memory.index_select(0, states), m, table.clip)
    # addcmul rounds once, as add with alpha does
    if table.looks_back:
        made = torch.where(looks_back, torch.addcmul(made, d, memory.index_select(0, before)), made)
    if table.draws:
        assert buffers.noises is not None
        made = torch.where(has_noise, torch.addcmul(made, s, buffers.noises.index_select(0, draw)), made)
    memory.index_copy_(0, keep, torch.where(is_made, made, memory.index_select(0, keep)))


def _sum(table: WaveTable, update: Tensor, buffers: Buffers) -> None:
    """Correct and compare, one sum after another."""
    padded, memory, change, moved = table.padded, buffers.memory, buffers.change, buffers.moved
    sums, adds = _of(padded.sums, update).unbind(1), _of(padded.adds, update).unbind(1)
    for each, does in zip(sums, adds, strict=True):
        slot, new, old, compare, iteration = each[:, None].unbind()
        has_bracket, is_compared, is_whole = does[:, None].unbind()
        value = memory.index_select(0, slot)
        corrected = value + (memory.index_select(0, new) - memory.index_select(0, old))
        value = torch.where(has_bracket, corrected, value)
        memory.index_copy_(0, slot, value)
        previous = memory.index_select(0, compare)
        # without the leading dimension: the mean adds up in the order of the reference
        distance = (value - previous).abs()[0].flatten(1).mean(1)
        change.index_copy_(0, iteration, torch.where(is_whole, distance, change.index_select(0, iteration)))
        if table.watches:
            differs = is_compared & (value != previous).flatten(2).any(2)
            moved.index_copy_(0, iteration, moved.index_select(0, iteration) | differs)


def _enter(table: WaveTable, update: Tensor, buffers: Buffers, network: NetworkInput, out: Tensor) -> None:
    """Write the first rows of each branch."""
    padded = table.padded
    given = buffers.memory.index_select(0, _of(padded.entering, update))
    if padded.scaled:
        given = _of(padded.scale, update) * given
    rows = out.unflatten(0, (network.branches, -1))[:, : table.most_entering]
    rows.copy_(torch.where(_of(padded.enters, update), given.to(out.dtype), rows))


def _of(column: Tensor, update: Tensor) -> Tensor:
    """The entries of an update; update: [1]."""
    return column.index_select(0, update)[0]
