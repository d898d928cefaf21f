"""The update in plain PyTorch: a few batched operations, however many rows there are."""

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
    batch, values = table.batches[number], table.updates[number].made
    memory, slots, rows = buffers.memory, buffers.slots, buffers.rows
    made = None
    if values:
        assert m is not None
        x = rows[values[0].state] if len(values) == 1 else memory.index_select(0, batch.states)
        made = _made(batch, x, _guided(m, guidance).to(memory.dtype), buffers, table.clip)
        if len(values) == 1:
            rows[values[0].keep].copy_(made)
        else:
            memory.index_copy_(0, batch.keep, made)
    for slot, bracket, compare, iteration, whole in batch.sums:
        if bracket is not None:
            new, old = bracket
            slots[slot].add_(slots[new] - slots[old])
        if compare is not None and whole:
            torch.mean((slots[slot] - slots[compare]).abs().flatten(1), 1, out=buffers.change[iteration])
        if compare is not None and table.watches:
            buffers.moved[iteration] |= (slots[slot] != slots[compare]).flatten(1).any(1)
    if not table.updates[number].entering:
        return None
    if batch.entering is None:
        assert made is not None, "what enters is what was made"
        return _network_input(made, batch.scale, network, out)
    entering = memory.index_select(0, batch.entering)
    return _network_input(entering, batch.scale, network, out)


def _made(batch: Batch, x: Tensor, m: Tensor, buffers: Buffers, clip: float | None) -> Tensor:
    if batch.rows is not None:
        m = m.index_select(0, batch.rows)
    made = x if batch.a is None else batch.a * x
    if batch.b is not None:
        made = made + batch.b * m
    if batch.c is not None:
        assert clip is not None
        made = made + batch.c * (batch.p * x + batch.q * m).clamp(-clip, clip)
    for terms, source in ((batch.look_back, buffers.memory), (batch.noises, buffers.noises)):
        if terms is not None:
            assert source is not None
            term = terms.coefficients * source.index_select(0, terms.reads)
            made = made + term if terms.values is None else made.index_add(0, terms.values, term)
    return made


def _guided(m: Tensor, guidance: Tensor | None) -> Tensor:
    """sum_g w_g m_g of the branches, in at least float32."""
    if guidance is None:
        return m
    branches = m.to(torch.promote_types(m.dtype, guidance.dtype)).unflatten(0, (len(guidance), -1))
    combined: Tensor = torch.tensordot(guidance.to(branches.dtype), branches, dims=1)
    return combined


def _network_input(entering: Tensor, scale: Tensor | None, network: NetworkInput, out: Tensor | None) -> Tensor:
    scaled = entering if scale is None else scale * entering
    if out is None and network.branches == 1 and not network.channels_last:
        return scaled.to(network.dtype or scaled.dtype)
    if out is None:
        out = network.empty(len(scaled), scaled[0])
    return out.copy_(scaled.repeat(network.branches, *[1] * (scaled.ndim - 1)))
