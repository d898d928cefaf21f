"""The first launch of a wave: the sweep along the grid."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.arithmetic import clamped, combined, offsets, ring_slot
from ..common.layout import with_inner_layout
from .memory import Memory
from .table import Sweep, Table

# Elements of a program. It waits for memory at every point, so many small programs hide the latency; with one warp no
# warp waits for another. 8 elements a thread, so that half-precision rows move 16 bytes at once.
SWEEP_BLOCK = {torch.float32: 256, torch.float64: 128}
SWEEP_WARPS = 1
STAGES = 3

# numbers of each step, in the order of `Table.numbers`: a, b, c, e, p, q, momentum, spread
_NUMBERS = tl.constexpr(8)


@triton.jit(do_not_specialize=["first", "window", "sweeps", "tiles"])
def _sweep(
    iterates, outputs, m, guidance, draws, x0_prev, numbers,
    first, window, sweeps, tiles, elements, step, iterate_stride,
    m_branch, m_row, m_sample, m_inner, m_outer_stride, m_inner_stride,
    clip: tl.float64,
    ITERATES: tl.constexpr, BRANCHES: tl.constexpr, GUIDED: tl.constexpr, CLIPPED: tl.constexpr,
    NOISY: tl.constexpr, MOMENTUM: tl.constexpr, GIVEN: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = iterates.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    tile = program % tiles
    lane = tl.arange(0, BLOCK)
    mask = lane < elements - tile * BLOCK
    # offset of this program's first element in a grid point
    in_state = sample * elements + tile * BLOCK
    newest = ring_slot(iterates, sweeps, ITERATES, iterate_stride) + in_state
    written = ring_slot(iterates, sweeps + 1, ITERATES, iterate_stride) + in_state
    outputs += in_state
    if NOISY:
        draws += in_state
    # offsets of this program's elements in a row of m
    if DENSE:
        in_row = sample * m_sample + tile * BLOCK + lane
    else:
        element = (tile * BLOCK).to(tl.int32) + lane
        in_row = sample * m_sample + offsets(element, m_inner, m_outer_stride, m_inner_stride, False)
    bound = tl.full([BLOCK], clip, dtype)

    place = first.to(tl.int64) * step
    here = tl.load(newest + place + lane, mask, 0)
    x = here  # the sweep does not move its first point
    tl.store(written + place + lane, here, mask)
    number = numbers + first * _NUMBERS
    x0_before = here
    if MOMENTUM:
        if GIVEN:
            x0_before = tl.load(x0_prev + in_state + lane, mask, 0)
        if first > 0:
            x0_before = tl.load(number - _NUMBERS + 4) * tl.load(newest + place - step + lane, mask, 0)
            x0_before += tl.load(number - _NUMBERS + 5) * tl.load(outputs + place - step + lane, mask, 0)
            if CLIPPED:
                x0_before = clamped(x0_before, bound)

    for i in tl.range(0, window, num_stages=STAGES):
        here = tl.load(newest + place + lane, mask, 0)
        output = combined(m + in_row, m_branch, guidance, mask, BRANCHES, GUIDED, dtype)
        m += m_row
        tl.store(outputs + place + lane, output, mask)
        f = tl.load(number) * here + tl.load(number + 1) * output
        if CLIPPED or MOMENTUM:
            x0 = tl.load(number + 4) * here + tl.load(number + 5) * output
            if CLIPPED:
                x0 = clamped(x0, bound)
                f += tl.load(number + 3) * x0
        if MOMENTUM:
            if not GIVEN:
                # the first step of all has no x0 before it
                x0_before = tl.where(first + i == 0, x0, x0_before)
            added = tl.load(number + 6) * (x0 - x0_before)
            x0_before = x0
            if NOISY:
                added += tl.load(number + 7) * tl.load(draws + place + lane, mask, 0)
            f += added
        elif NOISY:
            f += tl.load(number + 7) * tl.load(draws + place + lane, mask, 0)
        x = f + tl.load(number + 2) * (x - here)
        place += step
        tl.store(written + place + lane, x, mask)
        number += _NUMBERS


def sweep(table: Table, wave: Sweep, memory: Memory, m: Tensor, guidance: Tensor | None) -> None:
    """See `reference.sweep`; one launch."""
    x, rows = memory.x, len(wave.positions)
    m, layout = with_inner_layout(m, x)
    elements, block = x[0, 0].numel(), SWEEP_BLOCK[x.dtype]
    tiles = triton.cdiv(elements, block)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _sweep[(tiles * x.shape[1],)](
            memory.iterates, memory.m, m, guidance, memory.draws if table.spread is not None else None,
            memory.x0_prev, table.numbers,
            wave.first, table.num_steps - wave.first, memory.sweeps, tiles, elements, x[0].numel(),
            memory.iterates.stride(0),
            rows * m.stride(0), m.stride(0), m.stride(1), *layout,
            0.0 if table.clip is None else table.clip,
            ITERATES=len(memory.iterates), BRANCHES=1 if guidance is None else len(guidance),
            GUIDED=guidance is not None, CLIPPED=table.clip is not None,
            NOISY=table.spread is not None, MOMENTUM=table.momentum is not None, GIVEN=memory.x0_prev is not None,
            DENSE=layout == (elements, 0, 1), BLOCK=block, STAGES=STAGES,
            num_warps=SWEEP_WARPS,
            # round as the reference and the scheduler's own step do, to the bit
            enable_fp_fusion=False,
        )  # fmt: skip
