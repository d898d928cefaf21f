"""The scan in one launch: a program owns a tile of elements of one sample and walks the window."""

from __future__ import annotations

from itertools import product

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on_device_of
from ..layout import Inner
from ..resources import Specimen

BLOCK = 1024
NUM_WARPS = 4
STAGES = 3
# elements of the partial sums that the last program reduces at once
REDUCED = 512


@triton.jit(do_not_specialize=["window", "samples", "tiles"])
def _scan(
    y,
    m,
    guidance,
    noise,
    start,
    table,
    out,
    partials,
    tickets,
    squared_error,
    window,
    samples,
    elements,
    tiles,
    y_step,
    y_sample,
    m_branch,
    m_step,
    m_sample,
    m_outer,
    m_inner,
    inner,
    noise_step,
    noise_sample,
    start_sample,
    out_step,
    out_sample,
    clip: tl.float64,
    BRANCHES: tl.constexpr,
    GUIDED: tl.constexpr,
    NOISY: tl.constexpr,
    CLIPPED: tl.constexpr,
    DENSE: tl.constexpr,
    SINGLE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    REDUCED: tl.constexpr,
    STAGES: tl.constexpr,
):
    dtype = y.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    tile = program % tiles
    first = tile * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < elements - first

    x = tl.load(start + sample * start_sample + first + lane, mask, 0)
    y_point = y + sample * y_sample + first + lane
    here = tl.load(y_point, mask, 0)
    if DENSE:
        output_point = m + sample * m_sample + first + lane
    else:
        element = first.to(tl.int32) + lane
        output_point = m + sample * m_sample + (element // inner).to(tl.int64) * m_outer
        output_point += (element % inner).to(tl.int64) * m_inner
    noise_point = noise
    if NOISY:
        noise_point = noise + sample * noise_sample + first + lane
    out_point = out + sample * out_sample + first + lane
    if SINGLE:
        error_point = squared_error + sample
    else:
        error_point = partials + sample * window * tiles + tile

    for _ in tl.range(0, window, num_stages=STAGES):
        y_point += y_step
        there = tl.load(y_point, mask, 0)
        output = tl.load(output_point, mask, 0).to(dtype)
        if GUIDED:
            output = tl.load(guidance) * output
            for branch in tl.static_range(1, BRANCHES):
                offset = tl.full([], branch, tl.int64) * m_branch
                output += tl.load(guidance + branch) * tl.load(output_point + offset, mask, 0).to(dtype)
        output_point += m_step
        f = tl.load(table) * here + tl.load(table + 1) * output
        if CLIPPED:
            bound = tl.full([BLOCK], clip, dtype)
            clipped = tl.load(table + 5) * here + tl.load(table + 6) * output
            # comparisons that are false for NaN: it stays
            clipped = tl.where(clipped > bound, bound, tl.where(clipped < -bound, -bound, clipped))
            f += tl.load(table + 4) * clipped
        if NOISY:
            f += tl.load(table + 3) * tl.load(noise_point, mask, 0)
            noise_point += noise_step
        x = f + tl.load(table + 2) * (x - here)
        table += 7
        tl.store(out_point, x, mask)
        out_point += out_step
        difference = x - there
        tl.store(error_point, tl.sum(difference * difference, 0))
        if SINGLE:
            error_point += samples
        else:
            error_point += tiles
        here = there

    if not SINGLE:
        # every thread's sums are written before the ticket is drawn
        tl.debug_barrier()
        if tl.atomic_add(tickets + sample, 1, sem="acq_rel") == tiles - 1:
            tl.store(tickets + sample, 0)
            partials += sample * window * tiles
            for first_step in range(0, window, REDUCED // COLUMNS):
                step = first_step + tl.arange(0, REDUCED // COLUMNS)
                total = tl.zeros([REDUCED // COLUMNS, COLUMNS], dtype)
                for first_tile in range(0, tiles, COLUMNS):
                    column = first_tile + tl.arange(0, COLUMNS)
                    inside = (step < window)[:, None] & (column < tiles)[None, :]
                    point = partials + step.to(tl.int64)[:, None] * tiles + column[None, :]
                    total += tl.load(point, inside, 0, cache_modifier=".cg")
                error = tl.sum(total, 1)
                tl.store(squared_error + step.to(tl.int64) * samples + sample, error, step < window)


def affine_scan(
    y: Tensor,
    m: Tensor,
    table: Tensor,
    *,
    start: Tensor,
    noise: Tensor | None,
    clip: float | None,
    guidance: Tensor | None,
    out: Tensor,
    layout: Inner,
    counts: Tensor,
) -> Tensor:
    """Launch. layout: of the elements of m. Returns the squared errors."""
    window, samples = out.shape[:2]
    elements = out[0, 0].numel()
    tiles = triton.cdiv(elements, BLOCK)
    squared_error = y.new_empty(window, samples)
    partials = y.new_empty(samples, window, tiles) if tiles > 1 else None
    branch_stride, step_stride, sample_stride = m.stride()[:3] if guidance is not None else (0, *m.stride()[:2])
    with on_device_of(y):
        _scan[(tiles * samples,)](
            y,
            m,
            guidance,
            noise,
            start,
            table,
            out,
            partials,
            counts,
            squared_error,
            window,
            samples,
            elements,
            tiles,
            y.stride(0),
            y.stride(1),
            branch_stride,
            step_stride,
            sample_stride,
            layout.outer_stride,
            layout.inner_stride,
            layout.inner,
            noise.stride(0) if noise is not None else 0,
            noise.stride(1) if noise is not None else 0,
            start.stride(0),
            out.stride(0),
            out.stride(1),
            0.0 if clip is None else clip,
            BRANCHES=len(guidance) if guidance is not None else 1,
            GUIDED=guidance is not None,
            NOISY=noise is not None,
            CLIPPED=clip is not None,
            DENSE=layout == (elements, 0, 1),
            SINGLE=tiles == 1,
            COLUMNS=min(max(triton.next_power_of_2(tiles), 16), 256),
            BLOCK=BLOCK,
            REDUCED=REDUCED,
            STAGES=STAGES,
            num_warps=NUM_WARPS,
            # the roundings of the reference, and of a scheduler's own step, to the bit
            enable_fp_fusion=False,
        )
    return squared_error


def _specimen(
    name: str, network: str, branches: int, extras: bool, most_registers: int, dense: bool = True
) -> Specimen:
    integers = "window samples elements tiles y_step y_sample m_branch m_step m_sample m_outer m_inner inner noise_step"
    signature = dict.fromkeys((integers + " noise_sample start_sample out_step out_sample").split(), "i32")
    signature |= dict.fromkeys(["y", "start", "table", "out", "partials", "squared_error"], "*fp32")
    signature |= {"m": "*" + network, "tickets": "*i32", "clip": "fp64"}
    constants = {
        "BRANCHES": branches,
        "GUIDED": branches > 1,
        "NOISY": extras,
        "CLIPPED": extras,
        "DENSE": dense,
        "SINGLE": False,
        "COLUMNS": 16,
        "BLOCK": BLOCK,
        "REDUCED": REDUCED,
        "STAGES": STAGES,
    }
    for tensor, present in (("guidance", branches > 1), ("noise", extras)):
        if present:
            signature[tensor] = "*fp32"
        else:
            constants[tensor] = None
    each = BLOCK // (32 * NUM_WARPS)
    of_state, of_output = each * 32 // 128, each * int(network[2:]) // 128
    # the start, the first point and the next, the noise; outputs that are not in order are read one by one
    loads = (3 + extras) * of_state + dense * branches * of_output
    return Specimen(name, _scan, signature, constants, NUM_WARPS, most_registers, (loads, of_state))


SPECIMENS = [
    *(
        _specimen(f"{network}, {branches} branches{', noise, clip' * extras}", network, branches, extras, 80)
        for network, branches, extras in product(("fp16", "fp32"), (1, 2), (False, True))
    ),
    _specimen("fp16 in channels_last, 2 branches", "fp16", 2, False, 128, dense=False),
]
