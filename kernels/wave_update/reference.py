"""The update in plain PyTorch: one formula for all rows of the wave at once, and an addition for each further term."""

from __future__ import annotations

import torch
from torch import Tensor

from .batched import Batch
from .buffers import Buffers, NetworkInput
from .table import WaveTable


def wave_update(
    table: WaveTable,
    number: int,
    buffers: Buffers,
    m: Tensor | None,
    guidance: Tensor | None,
    network: NetworkInput,
    out: Tensor | None,
) -> Tensor | None:
    """See `srds_fast.kernels.wave_update.wave_update`."""
    update, batch = table.updates[number], table.batches[number]
    memory, slots, rows = buffers.memory, buffers.slots, buffers.rows
    made = None
    if update.made:
        assert m is not None
        m = guided(m, guidance)
        if m.dtype != memory.dtype:
            m = m.to(memory.dtype)
        alone = update.made[0] if len(update.made) == 1 else None
        x = memory.index_select(0, batch.states) if alone is None else rows[alone.state]
        made = make(batch, x, m, table.clip)
        if alone is None:
            memory.index_copy_(0, batch.keep, made)
        else:
            rows[alone.keep].copy_(made)
    for keep, before, d in batch.looks_back:
        slots[keep].add_(slots[before], alpha=d)
    for keep, draw, s in batch.noises:
        slots[keep].add_(buffers.noise_of(draw), alpha=s)
    for slot, bracket, compare, iteration, whole in update.sums:
        if bracket is not None:
            new, old = bracket
            slots[slot].add_(slots[new] - slots[old])
        if compare is not None and whole:
            torch.mean((slots[slot] - slots[compare]).abs().flatten(1), 1, out=buffers.change[iteration])
        if compare is not None and table.watches:
            buffers.moved[iteration] |= (slots[slot] != slots[compare]).flatten(1).any(1)
    if not update.entering:
        return None
    entering = made if batch.entering is None else memory.index_select(0, batch.entering)
    assert entering is not None, "what enters is what was made"
    return _network_input(entering, batch.scale, network, out)


def make(batch: Batch, x: Tensor, m: Tensor, clip: float | None) -> Tensor:
    """The values of one formula, [values, samples, ...]; x: their states; m: rows of the network, branches summed."""
    if batch.rows is not None:
        m = m.index_select(0, batch.rows)
    made = x if batch.a is None else batch.a * x
    if batch.b is not None:
        made = made + batch.b * m
    if batch.c is not None:
        assert clip is not None
        made = made + batch.c * (batch.p * x + batch.q * m).clamp(-clip, clip)
    return made


def guided(m: Tensor, guidance: Tensor | None) -> Tensor:
    """sum_g w_g m_g of the branches, in the dtype of the weights."""
    if guidance is None:
        return m
    if m.dtype != guidance.dtype:
        m = m.to(guidance.dtype)
    weights = guidance.view(-1, *[1] * m.ndim)
    combined: Tensor = (weights * m.unflatten(0, (len(weights), -1))).sum(0)
    return combined


def _network_input(entering: Tensor, scale: Tensor | None, network: NetworkInput, out: Tensor | None) -> Tensor:
    given = entering if scale is None else scale * entering
    if out is None and network.channels_last:
        out = network.empty(len(given), given[0])
    if network.dtype not in (None, given.dtype):
        given = given.to(network.dtype)
    if network.branches > 1:
        given = torch.cat([given] * network.branches)
    return given if out is None else out.copy_(given)
