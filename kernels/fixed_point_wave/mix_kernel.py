"""The launches after the sweep: inner products and weights where iterates are mixed, and then everything else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.arithmetic import offsets, ring_slot, rounded
from ..common.layout import with_inner_layout
from ..common.network_input import NetworkInput
from .memory import Memory, SweepResult
from .table import Sweep, Table

BLOCK = 1024
NUM_WARPS = 4
# about how many programs take inner products: each takes more tiles of one point where there would be more programs
PROGRAMS = 1024
# the most points, and the most partial sums of all of them, that the last program of a sample takes at once
POINTS = 256
REDUCED = 512


@triton.jit(do_not_specialize=["first", "window", "sweeps", "count", "programs", "tiles_each"])
def _gram(
    iterates, residuals, partials, prefixes, weights, tickets,
    first, window, sweeps, count, programs, tiles_each, elements, step, iterate_stride,
    regularisation: tl.float64,
    ITERATES: tl.constexpr, RESIDUALS: tl.constexpr, H: tl.constexpr, POINTS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The inner products of all points, and in the last program of a sample the weights that follow from them."""
    PAIRS: tl.constexpr = H * (H + 1) // 2 + H
    program = tl.program_id(0).to(tl.int64)
    part, row, sample = program % programs, program // programs % window, program // programs // window
    in_sample = (first + 1 + row) * step + sample * elements
    newest = ring_slot(iterates, sweeps, ITERATES, iterate_stride) + in_sample
    written = ring_slot(iterates, sweeps + 1, ITERATES, iterate_stride) + in_sample
    residuals += in_sample

    # the lower triangle of the Gram matrix row by row, then the right-hand side
    sums = ()
    for _ in tl.static_range(PAIRS):
        sums = sums + (tl.zeros([], tl.float64),)
    for number in range(tiles_each):
        start = (part * tiles_each + number) * BLOCK
        lane = tl.arange(0, BLOCK)
        mask = lane < elements - start
        residual = tl.load(written + start + lane, mask, 0) - tl.load(newest + start + lane, mask, 0)
        # differences, the oldest first, each rounded in the dtype of the state; zero where there is none yet
        vectors = ()
        oldest = ring_slot(residuals, sweeps + RESIDUALS - H, RESIDUALS, iterate_stride)
        older = tl.load(oldest + start + lane, mask & (count >= H), 0)
        for a in tl.static_range(H):
            if a == H - 1:
                newer = residual
            else:
                slot = ring_slot(residuals, sweeps + RESIDUALS - H + 1 + a, RESIDUALS, iterate_stride)
                newer = tl.load(slot + start + lane, mask & (count >= H - 1 - a), 0)
            vectors = vectors + (tl.where(count >= H - a, newer - older, 0).to(tl.float64),)
            older = newer
        vectors = vectors + (residual.to(tl.float64),)
        added = ()
        for a in tl.static_range(H):
            for b in tl.static_range(a + 1):
                added = added + (sums[a * (a + 1) // 2 + b] + tl.sum(vectors[a] * vectors[b], 0),)
        for a in tl.static_range(H):
            added = added + (sums[PAIRS - H + a] + tl.sum(vectors[a] * vectors[H], 0),)
        sums = added
    partials += sample * PAIRS * window * programs
    for number_of_sum in tl.static_range(PAIRS):
        tl.store(partials + (number_of_sum * window + row) * programs + part, sums[number_of_sum])
    prefixes += sample * PAIRS * window
    weights += sample * window * H
    # barrier: every thread must have written its sums before the program is counted
    tl.debug_barrier()
    if tl.atomic_add(tickets + sample, 1, sem="acq_rel") == window * programs - 1:
        # The last program of a sample adds up all partial sums, takes prefix sums along the window, and solves for the
        # weights. The order of the sums is fixed, so the result is deterministic, and no second launch is needed.
        tl.store(tickets + sample, 0)
        for pair in range(PAIRS):
            carried = tl.zeros([], tl.float64)
            for first_row in range(0, window, POINTS):
                point = first_row + tl.arange(0, POINTS)
                place = pair * window + point.to(tl.int64)
                total = tl.zeros([POINTS, COLUMNS], tl.float64)
                for first_part in range(0, programs, COLUMNS):
                    column = first_part + tl.arange(0, COLUMNS)
                    inside = (point < window)[:, None] & (column < programs)[None, :]
                    at = partials + place[:, None] * programs + column[None, :]
                    total += tl.load(at, inside, 0, cache_modifier=".cg")
                of_point = tl.sum(total, 1)
                tl.store(prefixes + place, carried + tl.cumsum(of_point, 0), point < window)
                carried += tl.sum(of_point, 0)
        # barrier: threads read prefix sums that other threads have written
        tl.debug_barrier()
        for first_row in range(0, window, POINTS):
            _solve(prefixes, weights, first_row + tl.arange(0, POINTS), window, regularisation, H)


@triton.jit
def _solve(prefixes, weights, row, window, regularisation, H: tl.constexpr):
    """Solve for the weights of a vector of points, each by its own LDL^T decomposition, unrolled."""
    PAIRS: tl.constexpr = H * (H + 1) // 2 + H
    mask = row < window
    # lower[i(i+1)/2 + j] is L_ij D_j
    lower = ()
    scale = ()
    for i in tl.static_range(H):
        for j in tl.static_range(i + 1):
            entry = tl.load(prefixes + (i * (i + 1) // 2 + j) * window + row, mask, 0, cache_modifier=".cg")
            if i == j:
                entry += regularisation
            for k in tl.static_range(j):
                entry -= lower[i * (i + 1) // 2 + k] * lower[j * (j + 1) // 2 + k] * scale[k]
            lower = lower + (entry,)
        scale = scale + (1.0 / lower[i * (i + 1) // 2 + i],)
    halfway = ()
    for i in tl.static_range(H):
        entry = tl.load(prefixes + (PAIRS - H + i) * window + row, mask, 0, cache_modifier=".cg")
        for k in tl.static_range(i):
            entry -= lower[i * (i + 1) // 2 + k] * halfway[k]
        halfway = halfway + (entry * scale[i],)
    # from the last unknown to the first
    solved = ()
    for n in tl.static_range(H):
        entry = halfway[H - 1 - n]
        for k in tl.static_range(n):
            entry -= lower[(H - 1 - k) * (H - k) // 2 + H - 1 - n] * scale[H - 1 - n] * solved[k]
        solved = solved + (entry,)
        tl.store(weights + row.to(tl.int64) * H + H - 1 - n, entry.to(weights.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["first", "window", "sweeps", "count", "tiles"])
def _mix(
    iterates, residuals, weights, level, next_rows, scale, given, sample_out, partials, change, stationary, tickets,
    first, window, sweeps, count, tiles, elements, step, iterate_stride,
    given_branch, given_row, given_sample, given_inner, given_outer_stride, given_inner_stride,
    ITERATES: tl.constexpr, RESIDUALS: tl.constexpr, H: tl.constexpr, SCALED: tl.constexpr, INPUTS: tl.constexpr,
    INPUT_DENSE: tl.constexpr, POINTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = iterates.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    tile, row, sample = program % tiles, program // tiles % window, program // tiles // window
    start = tile * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < elements - start
    position = first + 1 + row
    place = position * step + sample * elements + start
    written = ring_slot(iterates, sweeps + 1, ITERATES, iterate_stride) + place
    x = tl.load(ring_slot(iterates, sweeps, ITERATES, iterate_stride) + place + lane, mask, 0)
    value = tl.load(written + lane, mask, 0)
    residual = value - x
    if H > 0:
        tl.store(ring_slot(residuals, sweeps, RESIDUALS, iterate_stride) + place + lane, residual, mask)
        # the first point is exact if the one before it is, to the bit: x + (f - x) would round
        if (row > 0) & (count > 0):
            weights += (sample * window + row) * H
            correction = tl.zeros([BLOCK], dtype)
            slot = ring_slot(iterates, sweeps + ITERATES - H, ITERATES, iterate_stride)
            older = tl.load(slot + place + lane, mask & (count >= H), 0)
            slot = ring_slot(residuals, sweeps + RESIDUALS - H, RESIDUALS, iterate_stride)
            older_residual = tl.load(slot + place + lane, mask & (count >= H), 0)
            # the oldest difference first
            for a in tl.static_range(H):
                if a == H - 1:
                    newer = x
                    newer_residual = residual
                else:
                    there = mask & (count >= H - 1 - a)
                    slot = ring_slot(iterates, sweeps + ITERATES - H + 1 + a, ITERATES, iterate_stride)
                    newer = tl.load(slot + place + lane, there, 0)
                    slot = ring_slot(residuals, sweeps + RESIDUALS - H + 1 + a, RESIDUALS, iterate_stride)
                    newer_residual = tl.load(slot + place + lane, there, 0)
                both = (newer - older) + (newer_residual - older_residual)
                correction += tl.where(count >= H - a, tl.load(weights + a) * both, 0)
                older = newer
                older_residual = newer_residual
            value = (x + residual) - correction
            tl.store(written + lane, value, mask)
    if row == window - 1:
        tl.store(sample_out + sample * elements + start + lane, value, mask)
    next_row = tl.load(next_rows + position)
    if next_row >= 0:
        scaled = value
        if SCALED:
            scaled = value * tl.load(scale + position)
        wanted = rounded(scaled, given.dtype.element_ty)
        input_point = given + next_row.to(tl.int64) * given_row + sample * given_sample
        if INPUT_DENSE:
            input_point += start + lane
        else:
            element = start.to(tl.int32) + lane
            input_point += offsets(element, given_inner, given_outer_stride, given_inner_stride, False)
        for branch in tl.static_range(INPUTS):
            tl.store(input_point + tl.full([], branch, tl.int64) * given_branch, wanted, mask)
    moved = tl.where(mask, tl.abs(value - x), 0)
    tl.store(partials + (sample * window + row) * tiles + tile, tl.sum(moved, 0))

    # barrier: every thread must have written its sums before the program is counted
    tl.debug_barrier()
    if tl.atomic_add(tickets + sample, 1, sem="acq_rel") == window * tiles - 1:
        tl.store(tickets + sample, 0)
        partials += sample * window * tiles
        largest = tl.zeros([], dtype)
        not_numbers = tl.zeros([], tl.int32)
        for first_row in range(0, window, POINTS):
            point = first_row + tl.arange(0, POINTS)
            total = tl.zeros([POINTS, COLUMNS], dtype)
            for first_tile in range(0, tiles, COLUMNS):
                column = first_tile + tl.arange(0, COLUMNS)
                inside = (point < window)[:, None] & (column < tiles)[None, :]
                part = point.to(tl.int64)[:, None] * tiles + column[None, :]
                total += tl.load(partials + part, inside, 0, cache_modifier=".cg")
            of_point = tl.load(level + first + 1 + point, point < window, 0) * (tl.sum(total, 1) / elements)
            # a maximum ignores NaN: count it
            largest = tl.maximum(largest, tl.max(of_point, 0))
            not_numbers += tl.sum((of_point != of_point).to(tl.int32), 0)
        largest = tl.where(not_numbers > 0, float("nan"), largest)
        tl.store(change + sample, largest)
        tl.store(stationary + sample, (largest == 0).to(tl.int8))


def mix(table: Table, wave: Sweep, memory: Memory, network: NetworkInput, check_stationary: bool) -> SweepResult:
    """See `reference.mix`; one launch, and one more with history. Every sweep launches the same kernels."""
    x, first = memory.x, wave.first
    samples, window, elements = x.shape[1], table.num_steps - first, x[0, 0].numel()
    weights = _weights(table, wave, memory) if table.history else None
    given = network.empty(0 if wave.next_positions is None else len(wave.next_positions), x[0])
    _, layout = with_inner_layout(given, x)
    tiles = triton.cdiv(elements, BLOCK)
    columns = min(max(triton.next_power_of_2(tiles), 2), 256)
    sample, change = x.new_empty(x.shape[1:]), x.new_empty(samples)
    stationary = torch.empty(samples, dtype=torch.bool, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _mix[(samples * window * tiles,)](
            memory.iterates, memory.residuals if table.history else None, weights, table.weight, wave.next_rows,
            table.input_scale, given, sample, x.new_empty(samples, window, tiles), change,
            stationary.view(torch.int8), memory.tickets,
            first, window, memory.sweeps, table.differences(memory.sweeps), tiles, elements, x[0].numel(),
            memory.iterates.stride(0),
            len(given) // network.branches * given.stride(0), given.stride(0), given.stride(1), *layout,
            ITERATES=len(memory.iterates), RESIDUALS=max(1, len(memory.residuals)), H=table.history,
            SCALED=table.input_scale is not None, INPUTS=network.branches, INPUT_DENSE=layout == (elements, 0, 1),
            POINTS=REDUCED // columns, COLUMNS=columns, BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            # round as the reference does, to the bit
            enable_fp_fusion=False,
        )  # fmt: skip
    memory.advance(table.num_steps)
    return SweepResult(
        sample, change, stationary if check_stationary else None, None if wave.next_positions is None else given
    )


def _weights(table: Table, wave: Sweep, memory: Memory) -> Tensor:
    """The weight of each difference at each point, [samples, points, H]; one launch."""
    x, first, history = memory.x, wave.first, table.history
    samples, window, elements = x.shape[1], table.num_steps - first, x[0, 0].numel()
    block = gram_block(history)
    tiles = triton.cdiv(elements, block)
    tiles_each = triton.cdiv(tiles, max(1, PROGRAMS // (window * samples)))
    programs = triton.cdiv(tiles, tiles_each)
    points = min(max(triton.next_power_of_2(table.num_steps), 16), POINTS)
    pairs = history * (history + 1) // 2 + history
    weights = x.new_empty(samples, window, history)
    with torch.cuda.device_of(x):
        _gram[(samples * window * programs,)](
            memory.iterates, memory.residuals, x.new_empty(samples, pairs, window, programs, dtype=torch.float64),
            x.new_empty(samples, pairs, window, dtype=torch.float64), weights, memory.tickets,
            first, window, memory.sweeps, table.differences(memory.sweeps), programs, tiles_each, elements,
            x[0].numel(), memory.iterates.stride(0),
            table.regularisation,
            ITERATES=len(memory.iterates), RESIDUALS=len(memory.residuals), H=history, POINTS=points,
            COLUMNS=REDUCED // points, BLOCK=block,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return weights


def gram_block(history: int) -> int:
    """Elements of a tile of the inner products: all its vectors are held in registers."""
    return BLOCK if history <= 2 else BLOCK // 2
