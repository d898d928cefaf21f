"""The wave in two launches, three with history: sweep along the grid, inner products and weights, all that follows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..anderson_mix.kernel import weights_of_last
from ..arithmetic import rounded
from ..dispatch import interpreted, on_device_of
from ..layout import inner_layout, with_inner_layout
from ..resources import Specimen
from ..wave_update.buffers import NetworkInput
from .memory import Memory, Refined
from .table import LOCAL, Sweep, Table

# a program of the sweep goes from point to point and waits for memory at each: many small ones hide that, and one warp
# has nobody to wait for. 8 elements a thread, so that half-precision rows move 16 bytes at once too
SWEEP_BLOCK = {torch.float32: 256, torch.float64: 128}
SWEEP_WARPS = 1
STAGES = 3
# of the other launches, whose points do not wait for each other
BLOCK = 1024
NUM_WARPS = 4
# programs of the inner products, about: each takes more tiles of one point where there would be more
PROGRAMS = 1024
# points that the last program of a sample takes at once, at most, and partial sums of all of them
POINTS = 256
REDUCED = 512
# the interpreter truncates where GPUs round
BY_HAND = interpreted()

# of a step, as they lie in `Table.numbers`: a, b, c, s, e, p, q, response, momentum, spread
_NUMBERS = tl.constexpr(10)
_LOCAL = tl.constexpr(LOCAL)


@triton.jit
def _combined(m, branch_stride, guidance, mask, BRANCHES: tl.constexpr, GUIDED: tl.constexpr, dtype: tl.constexpr):
    """The branches of the network's output in one."""
    output = tl.load(m, mask, 0).to(dtype)
    if GUIDED:
        output = tl.load(guidance) * output
        for branch in tl.static_range(1, BRANCHES):
            offset = tl.full([], branch, tl.int64) * branch_stride
            output += tl.load(guidance + branch) * tl.load(m + offset, mask, 0).to(dtype)
    return output


@triton.jit
def _clamped(x0, clip, dtype: tl.constexpr, BLOCK: tl.constexpr):
    bound = tl.full([BLOCK], clip, dtype)
    # comparisons that are false for NaN: it stays
    return tl.where(x0 > bound, bound, tl.where(x0 < -bound, -bound, x0))


@triton.jit(do_not_specialize=["first", "window", "nodes", "sweeps", "tiles"])
def _sweep(
    iterates,
    outputs,
    m,
    guidance,
    draws,
    x0_prev,
    numbers,
    walk,
    around,
    positions,
    first,
    window,
    nodes,
    sweeps,
    tiles,
    elements,
    step,
    iterate_stride,
    m_branch,
    m_row,
    m_sample,
    m_inner,
    m_outer_stride,
    m_inner_stride,
    clip: tl.float64,
    ITERATES: tl.constexpr,
    BRANCHES: tl.constexpr,
    GUIDED: tl.constexpr,
    SPARSE: tl.constexpr,
    CLIPPED: tl.constexpr,
    NOISY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    GIVEN: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    dtype: tl.constexpr = iterates.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    tile = program % tiles
    lane = tl.arange(0, BLOCK)
    mask = lane < elements - tile * BLOCK
    # of this program's first element at grid position 0
    in_state = sample * elements + tile * BLOCK
    newest = iterates + (sweeps % ITERATES).to(tl.int64) * iterate_stride + in_state
    older = iterates + ((sweeps + ITERATES - 1) % ITERATES).to(tl.int64) * iterate_stride + in_state
    made = iterates + ((sweeps + 1) % ITERATES).to(tl.int64) * iterate_stride + in_state
    outputs += in_state
    if NOISY:
        draws += in_state
    # of all its elements in a row of m
    if DENSE:
        in_row = sample * m_sample + tile * BLOCK + lane
    else:
        element = (tile * BLOCK).to(tl.int32) + lane
        in_row = sample * m_sample + (element // m_inner).to(tl.int64) * m_outer_stride
        in_row += (element % m_inner).to(tl.int64) * m_inner_stride

    place = first.to(tl.int64) * step
    here = tl.load(newest + place + lane, mask, 0)
    # where the sweep begins nothing moves
    x = here
    tl.store(made + place + lane, here, mask)
    number = numbers + first * _NUMBERS
    x0_before = here
    if MOMENTUM:
        if GIVEN:
            x0_before = tl.load(x0_prev + in_state + lane, mask, 0)
        if first > 0:
            x0_before = tl.load(number - _NUMBERS + 5) * tl.load(newest + place - step + lane, mask, 0)
            x0_before += tl.load(number - _NUMBERS + 6) * tl.load(outputs + place - step + lane, mask, 0)
            if CLIPPED:
                x0_before = _clamped(x0_before, clip, dtype, BLOCK)
    if SPARSE:
        # at the nodes around the point
        s0 = here
        s1 = here
        s2 = here
        s3 = here
        for k in tl.static_range(_LOCAL):
            # fewer nodes than that: the last has no weight
            node = tl.minimum(k, nodes - 1).to(tl.int64)
            position = tl.load(positions + node)
            at_node = position * step + lane
            expected = tl.load(outputs + at_node, mask, 0)
            moved = tl.load(newest + at_node, mask, 0) - tl.load(older + at_node, mask, 0)
            expected += tl.load(numbers + position * _NUMBERS + 7) * moved
            s0 = s1
            s1 = s2
            s2 = s3
            s3 = _combined(m + node * m_row + in_row, m_branch, guidance, mask, BRANCHES, GUIDED, dtype) - expected

    for i in tl.range(0, window, num_stages=STAGES):
        here = tl.load(newest + place + lane, mask, 0)
        if SPARSE:
            # a node further along comes among those around the point; loads that are masked do not happen
            node = tl.load(walk + 1).to(tl.int64)
            at_node = tl.load(walk + 2).to(tl.int64) * step + lane
            comes = node >= 0
            loaded = mask & comes
            expected = tl.load(outputs + at_node, loaded, 0)
            moved = tl.load(newest + at_node, loaded, 0) - tl.load(older + at_node, loaded, 0)
            expected += tl.load(numbers + tl.maximum(tl.load(walk + 2), 0) * _NUMBERS + 7) * moved
            said = _combined(m + node * m_row + in_row, m_branch, guidance, loaded, BRANCHES, GUIDED, dtype)
            s0 = tl.where(comes, s1, s0)
            s1 = tl.where(comes, s2, s1)
            s2 = tl.where(comes, s3, s2)
            s3 = tl.where(comes, said - expected, s3)
            row = tl.load(walk).to(tl.int64)
            said = _combined(m + row * m_row + in_row, m_branch, guidance, mask & (row >= 0), BRANCHES, GUIDED, dtype)
            output = tl.load(outputs + place + lane, mask, 0)
            output += tl.load(number + 7) * (here - tl.load(older + place + lane, mask, 0))
            learnt = tl.load(around) * s0
            learnt += tl.load(around + 1) * s1
            learnt += tl.load(around + 2) * s2
            learnt += tl.load(around + 3) * s3
            output = tl.where(row >= 0, said, output + learnt)
            walk += 3
            around += _LOCAL
        else:
            output = _combined(m + in_row, m_branch, guidance, mask, BRANCHES, GUIDED, dtype)
            m += m_row
        tl.store(outputs + place + lane, output, mask)
        f = tl.load(number) * here + tl.load(number + 1) * output
        if CLIPPED or MOMENTUM:
            x0 = tl.load(number + 5) * here + tl.load(number + 6) * output
            if CLIPPED:
                x0 = _clamped(x0, clip, dtype, BLOCK)
                f += tl.load(number + 4) * x0
        if MOMENTUM:
            if not GIVEN:
                # the first step of all looks back at nothing
                x0_before = tl.where(first + i == 0, x0, x0_before)
            added = tl.load(number + 8) * (x0 - x0_before)
            x0_before = x0
            if NOISY:
                added += tl.load(number + 9) * tl.load(draws + place + lane, mask, 0)
            f += added
        elif NOISY:
            f += tl.load(number + 9) * tl.load(draws + place + lane, mask, 0)
        x = f + tl.load(number + 2) * (x - here)
        place += step
        tl.store(made + place + lane, x, mask)
        number += _NUMBERS


@triton.jit(do_not_specialize=["first", "window", "sweeps", "count", "programs", "tiles_each"])
def _gram(
    iterates,
    residuals,
    partials,
    prefixes,
    weights,
    tickets,
    first,
    window,
    sweeps,
    count,
    programs,
    tiles_each,
    elements,
    step,
    iterate_stride,
    regularisation: tl.float64,
    ITERATES: tl.constexpr,
    RESIDUALS: tl.constexpr,
    H: tl.constexpr,
    POINTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PAIRS: tl.constexpr = H * (H + 1) // 2 + H
    program = tl.program_id(0).to(tl.int64)
    part = program % programs
    row = program // programs % window
    sample = program // programs // window
    in_sample = (first + 1 + row) * step + sample * elements
    newest = iterates + (sweeps % ITERATES).to(tl.int64) * iterate_stride + in_sample
    made = iterates + ((sweeps + 1) % ITERATES).to(tl.int64) * iterate_stride + in_sample
    residuals += in_sample

    # lower triangle of the Gram matrix row by row, then the right-hand side
    sums = ()
    for _ in tl.static_range(PAIRS):
        sums = sums + (tl.zeros([], tl.float64),)
    for number in range(tiles_each):
        start = (part * tiles_each + number) * BLOCK
        lane = tl.arange(0, BLOCK)
        mask = lane < elements - start
        residual = tl.load(made + start + lane, mask, 0) - tl.load(newest + start + lane, mask, 0)
        # differences, the oldest first, each rounded in the dtype of the state; zero where there is none yet
        vectors = ()
        oldest = ((sweeps + RESIDUALS - H) % RESIDUALS).to(tl.int64) * iterate_stride
        older = tl.load(residuals + oldest + start + lane, mask & (count >= H), 0)
        for a in tl.static_range(H):
            if a == H - 1:
                newer = residual
            else:
                slot = ((sweeps + RESIDUALS - H + 1 + a) % RESIDUALS).to(tl.int64) * iterate_stride
                newer = tl.load(residuals + slot + start + lane, mask & (count >= H - 1 - a), 0)
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
    weights_of_last(partials, prefixes, weights, tickets + sample, window, programs, regularisation, H, POINTS, COLUMNS)


@triton.jit(do_not_specialize=["first", "window", "sweeps", "count", "interpolated", "tiles"])
def _mix(
    iterates,
    residuals,
    weights,
    level,
    entering,
    scale,
    given,
    sample_out,
    partials,
    change,
    still,
    tickets,
    first,
    window,
    sweeps,
    count,
    interpolated,
    tiles,
    elements,
    step,
    iterate_stride,
    given_branch,
    given_row,
    given_sample,
    given_inner,
    given_outer_stride,
    given_inner_stride,
    ITERATES: tl.constexpr,
    RESIDUALS: tl.constexpr,
    H: tl.constexpr,
    SCALED: tl.constexpr,
    INPUTS: tl.constexpr,
    INPUT_DENSE: tl.constexpr,
    POINTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    dtype: tl.constexpr = iterates.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    row = program // tiles % window
    sample = program // tiles // window
    start = tile * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < elements - start
    position = first + 1 + row
    place = position * step + sample * elements + start
    made = iterates + ((sweeps + 1) % ITERATES).to(tl.int64) * iterate_stride + place
    x = tl.load(iterates + (sweeps % ITERATES).to(tl.int64) * iterate_stride + place + lane, mask, 0)
    value = tl.load(made + lane, mask, 0)
    residual = value - x
    if H > 0:
        tl.store(residuals + (sweeps % RESIDUALS).to(tl.int64) * iterate_stride + place + lane, residual, mask)
        # the first one is exact if the one before is, to the bit: x + (f - x) would round
        if (row > 0) & (count > 0):
            weights += (sample * window + row) * H
            correction = tl.zeros([BLOCK], dtype)
            slot = ((sweeps + ITERATES - H) % ITERATES).to(tl.int64) * iterate_stride
            older = tl.load(iterates + slot + place + lane, mask & (count >= H), 0)
            slot = ((sweeps + RESIDUALS - H) % RESIDUALS).to(tl.int64) * iterate_stride
            older_residual = tl.load(residuals + slot + place + lane, mask & (count >= H), 0)
            # the oldest first
            for a in tl.static_range(H):
                if a == H - 1:
                    newer = x
                    newer_residual = residual
                else:
                    there = mask & (count >= H - 1 - a)
                    slot = ((sweeps + ITERATES - H + 1 + a) % ITERATES).to(tl.int64) * iterate_stride
                    newer = tl.load(iterates + slot + place + lane, there, 0)
                    slot = ((sweeps + RESIDUALS - H + 1 + a) % RESIDUALS).to(tl.int64) * iterate_stride
                    newer_residual = tl.load(residuals + slot + place + lane, there, 0)
                both = (newer - older) + (newer_residual - older_residual)
                correction += tl.where(count >= H - a, tl.load(weights + a) * both, 0)
                older = newer
                older_residual = newer_residual
            value = (x + residual) - correction
            tl.store(made + lane, value, mask)
    if row == window - 1:
        tl.store(sample_out + sample * elements + start + lane, value, mask)
    enters = tl.load(entering + position)
    if enters >= 0:
        scaled = value
        if SCALED:
            scaled = value * tl.load(scale + position)
        wanted = rounded(scaled, given.dtype.element_ty, BY_HAND)
        input_point = given + enters.to(tl.int64) * given_row + sample * given_sample
        if INPUT_DENSE:
            input_point += start + lane
        else:
            element = start.to(tl.int32) + lane
            input_point += (element // given_inner).to(tl.int64) * given_outer_stride
            input_point += (element % given_inner).to(tl.int64) * given_inner_stride
        for branch in tl.static_range(INPUTS):
            tl.store(input_point + tl.full([], branch, tl.int64) * given_branch, wanted, mask)
    moved = tl.where(mask, tl.abs(value - x), 0)
    tl.store(partials + (sample * window + row) * tiles + tile, tl.sum(moved, 0))

    # every thread's sums are written before the ticket is drawn
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
            # a maximum leaves NaN out
            largest = tl.maximum(largest, tl.max(of_point, 0))
            not_numbers += tl.sum((of_point != of_point).to(tl.int32), 0)
        largest = tl.where(not_numbers > 0, float("nan"), largest)
        tl.store(change + sample, largest)
        # what is interpolated may move as long as it is
        is_still = (largest == 0) & (interpolated == 0)
        tl.store(still + sample, is_still.to(tl.int8))


def sweep(table: Table, wave: Sweep, memory: Memory, m: Tensor, guidance: Tensor | None) -> None:
    """See `reference.sweep`; one launch."""
    m = with_inner_layout(m, memory.x)
    x, walk, window = memory.x, wave.walk, table.num_steps - wave.first
    elements, step = x[0, 0].numel(), x[0].numel()
    layout = inner_layout("m", m, x)
    rows = len(wave.positions)
    block = SWEEP_BLOCK[x.dtype]
    tiles = triton.cdiv(elements, block)
    with on_device_of(x):
        _sweep[(tiles * x.shape[1],)](
            memory.iterates,
            memory.m,
            m,
            guidance,
            memory.draws if table.spread is not None else None,
            memory.x0_prev,
            table.numbers,
            None if walk is None else walk.rows,
            None if walk is None else walk.weights,
            wave.positions,
            wave.first,
            window,
            rows,
            memory.sweeps,
            tiles,
            elements,
            step,
            memory.iterates.stride(0),
            rows * m.stride(0),
            m.stride(0),
            m.stride(1),
            *layout,
            0.0 if table.clip is None else table.clip,
            ITERATES=len(memory.iterates),
            BRANCHES=1 if guidance is None else len(guidance),
            GUIDED=guidance is not None,
            SPARSE=walk is not None,
            CLIPPED=table.clip is not None,
            NOISY=table.spread is not None,
            MOMENTUM=table.momentum is not None,
            GIVEN=memory.x0_prev is not None,
            DENSE=layout == (elements, 0, 1),
            BLOCK=block,
            STAGES=STAGES,
            num_warps=SWEEP_WARPS,
            # the roundings of the reference, and of a scheduler's own step, to the bit
            enable_fp_fusion=False,
        )


def mix(table: Table, wave: Sweep, memory: Memory, network: NetworkInput, watch: bool) -> Refined:
    """See `reference.mix`; one launch, and one more with history. Which kernels these are is the same in all sweeps."""
    x, first = memory.x, wave.first
    samples, window = x.shape[1], table.num_steps - first
    elements, step = x[0, 0].numel(), x[0].numel()
    weights = _weights(table, wave, memory) if table.history else None
    given = network.empty(0 if wave.to_come is None else len(wave.to_come), x[0])
    layout = inner_layout("network", given, x)
    tiles = triton.cdiv(elements, BLOCK)
    columns = min(max(triton.next_power_of_2(tiles), 2), 256)
    sample, change = x.new_empty(x.shape[1:]), x.new_empty(samples)
    still = torch.empty(samples, dtype=torch.bool, device=x.device)
    with on_device_of(x):
        _mix[(samples * window * tiles,)](
            memory.iterates,
            memory.residuals if table.history else None,
            weights,
            table.weight,
            wave.entering,
            table.input_scale,
            given,
            sample,
            x.new_empty(samples, window, tiles),
            change,
            still.view(torch.int8),
            memory.tickets.counts,
            first,
            window,
            memory.sweeps,
            table.differences(memory.sweeps),
            int(wave.weights is not None),
            tiles,
            elements,
            step,
            memory.iterates.stride(0),
            len(given) // network.branches * given.stride(0),
            given.stride(0),
            given.stride(1),
            *layout,
            ITERATES=len(memory.iterates),
            RESIDUALS=max(1, len(memory.residuals)),
            H=table.history,
            SCALED=table.input_scale is not None,
            INPUTS=network.branches,
            INPUT_DENSE=layout == (elements, 0, 1),
            POINTS=REDUCED // columns,
            COLUMNS=columns,
            BLOCK=BLOCK,
            BY_HAND=BY_HAND,
            num_warps=NUM_WARPS,
            # the roundings of the reference to the bit
            enable_fp_fusion=False,
        )
    memory.advance(table.num_steps)
    return Refined(sample, change, still if watch else None, None if wave.to_come is None else given)


def _weights(table: Table, wave: Sweep, memory: Memory) -> Tensor:
    """Of each difference at each point, [samples, points, H]; one launch."""
    x, first, history = memory.x, wave.first, table.history
    samples, window = x.shape[1], table.num_steps - first
    elements = x[0, 0].numel()
    block = _gram_block(history)
    tiles = triton.cdiv(elements, block)
    tiles_each = triton.cdiv(tiles, max(1, PROGRAMS // (window * samples)))
    programs = triton.cdiv(tiles, tiles_each)
    points = min(max(triton.next_power_of_2(table.num_steps), 16), POINTS)
    pairs = history * (history + 1) // 2 + history
    weights = x.new_empty(samples, window, history)
    with on_device_of(x):
        _gram[(samples * window * programs,)](
            memory.iterates,
            memory.residuals,
            x.new_empty(samples, pairs, window, programs, dtype=torch.float64),
            x.new_empty(samples, pairs, window, dtype=torch.float64),
            weights,
            memory.tickets.counts,
            first,
            window,
            memory.sweeps,
            table.differences(memory.sweeps),
            programs,
            tiles_each,
            elements,
            x[0].numel(),
            memory.iterates.stride(0),
            table.regularisation,
            ITERATES=len(memory.iterates),
            RESIDUALS=len(memory.residuals),
            H=history,
            POINTS=points,
            COLUMNS=REDUCED // points,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
    return weights


def _gram_block(history: int) -> int:
    """Elements of a tile of the inner products: every vector of it is in registers."""
    return BLOCK if history <= 2 else BLOCK // 2


def _of_sweep(
    name: str, state: str, network: str, branches: int, most_registers: int, *, sparse: bool, extras: bool = False
) -> Specimen:
    constants: dict[str, object] = {
        "ITERATES": 4, "BRANCHES": branches, "GUIDED": branches > 1, "SPARSE": sparse, "CLIPPED": extras,
        "NOISY": extras, "MOMENTUM": extras, "GIVEN": False, "DENSE": True, "STAGES": STAGES,
        "BLOCK": SWEEP_BLOCK[torch.float32 if state == "fp32" else torch.float64],
    }  # fmt: skip
    absent = {"guidance": branches == 1, "draws": not extras, "x0_prev": True, "walk": not sparse, "around": not sparse}
    constants |= dict.fromkeys(name for name, is_absent in absent.items() if is_absent)
    types = dict.fromkeys(("iterates", "outputs", "guidance", "draws", "numbers", "around"), f"*{state}")
    types |= {"m": f"*{network}", "walk": "*i32", "positions": "*i64", "clip": "fp64"}
    # a thread's accesses of 16 bytes to its elements of a state, and to a row
    each = int(constants["BLOCK"]) // (32 * SWEEP_WARPS)
    of_state, of_row = (each * int(dtype[2:]) // 128 for dtype in (state, network))
    # the first point, the next; outputs and iterates of four nodes, of one and of the point; the noise
    states = 2 + sparse * (3 * (LOCAL + 1) + 2) + 3 * extras
    rows = LOCAL + 2 if sparse else 1
    wide = (states * of_state + branches * rows * of_row, 3 * of_state)
    return _specimen(f"sweep, {name}", _sweep, types, constants, SWEEP_WARPS, most_registers, wide)


def _of_gram(history: int, most_registers: int) -> Specimen:
    block = _gram_block(history)
    constants = {
        "ITERATES": history + 2, "RESIDUALS": history + 1, "H": history, "POINTS": POINTS, "COLUMNS": REDUCED // POINTS,
        "BLOCK": block,
    }  # fmt: skip
    types = dict.fromkeys(("iterates", "residuals", "weights"), "*fp32") | {"tickets": "*i32"}
    types |= {"partials": "*fp64", "prefixes": "*fp64", "regularisation": "fp64"}
    wide = ((history + 2) * block // (32 * NUM_WARPS) * 32 // 128, 0)
    # the inner products may fuse: nothing is compared with them bit by bit
    name = f"products, {history} differences"
    return _specimen(name, _gram, types, constants, NUM_WARPS, most_registers, wide, fuses=True)


def _of_mix(history: int, network: str, inputs: int, most_registers: int) -> Specimen:
    constants = {
        "ITERATES": max(history, 1) + 2, "RESIDUALS": history + 1, "H": history, "SCALED": True,
        "INPUTS": inputs, "INPUT_DENSE": True, "POINTS": 32, "COLUMNS": 16, "BLOCK": BLOCK, "BY_HAND": False,
    }  # fmt: skip
    absent = () if history else ("residuals", "weights")
    constants |= dict.fromkeys(absent)
    tensors = ("iterates", "residuals", "weights", "level", "scale", "sample_out", "partials", "change")
    types = dict.fromkeys(tensors, "*fp32") | {"given": f"*{network}", "entering": "*i32", "still": "*i8"}
    types |= {"tickets": "*i32"}
    each = BLOCK // (32 * NUM_WARPS)
    of_state, of_row = each * 32 // 128, each * int(network[2:]) // 128
    states = (2 + 2 * history) * of_state
    wide = (states, (1 + 2 * (history > 0)) * of_state + inputs * of_row)
    name = f"mixing, {history} differences, {network}"
    return _specimen(name, _mix, types, constants, NUM_WARPS, most_registers, wide)


def _specimen(
    name: str,
    of: triton.JITFunction,
    types: dict[str, str],
    constants: dict[str, object],
    num_warps: int,
    most_registers: int,
    wide: tuple[int, int],
    fuses: bool = False,
) -> Specimen:
    signature = {each: types.get(each, "i32") for each in of.arg_names if each not in constants}
    return Specimen(name, of, signature, constants, num_warps, most_registers, wide, fuses)


# a sweep between nodes holds much: one warp a program may have all registers that there are
SPECIMENS = [
    _of_sweep("2 branches", "fp32", "fp32", 2, 80, sparse=False),
    _of_sweep("fp16, noise, clip", "fp32", "fp16", 1, 100, sparse=False, extras=True),
    _of_sweep("nodes, 2 branches", "fp32", "fp16", 2, 220, sparse=True),
    _of_sweep("nodes, everything", "fp32", "fp32", 3, 255, sparse=True, extras=True),
    _of_sweep("nodes, float64", "fp64", "fp64", 1, 255, sparse=True, extras=True),
    *(_of_gram(*each) for each in ((2, 100), (5, 176))),
    *(_of_mix(*each) for each in ((0, "fp16", 1, 56), (2, "fp16", 2, 80), (5, "fp32", 1, 112))),
]
