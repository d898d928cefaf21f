"""The second launch of a sweep: along the grid, from each point to the next. One program a sample.

Where a sample is larger than a program can hold, each step is a launch: every program of a sample needs the sums over
all of its elements that the step before has made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.arithmetic import clamped, offsets, ring_slot, rounded
from ..common.layout import with_inner_layout
from ..common.network_input import NetworkInput
from .learn_kernel import NUMBERS, beyond, learn, movements
from .memory import Memory, SweepResult
from .sizes import REGISTERS, sharing
from .table import SecantTable

STAGES = 2
# points that the end of a sweep takes at once
POINTS = 256


@triton.jit
def _stepped(
    number, here, output, draws, change, carried, x0_before, x0_change_before, begins, bound, mask,
    CLIPPED: tl.constexpr, MOMENTUM: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    """The next point, x0, and the change of x0, where a point has changed, and its output by `carried` besides."""
    a = tl.load(number)
    b = tl.load(number + 1)
    p = tl.load(number + 3)
    q = tl.load(number + 4)
    response = tl.load(number + 5)
    x0 = here
    x0_change = change
    stepped = a * here + b * output
    slope = a + b * response
    by_output = b
    if CLIPPED or MOMENTUM:
        x0 = p * here + q * output
    if CLIPPED:
        e = tl.load(number + 2)
        inside = tl.where(tl.abs(x0) <= bound, 1.0, 0.0).to(here.dtype)
        x0 = clamped(x0, bound)
        stepped += e * x0
        by_output = b + e * q * inside
        slope = (a + e * p * inside) + by_output * response
    more = slope * change + by_output * carried
    if MOMENTUM:
        momentum = tl.load(number + 8)
        # the first step of all has no x0 before it
        stepped += momentum * (x0 - tl.where(begins, x0, x0_before))
        x0_change = (p + q * response) * change + q * carried
        if CLIPPED:
            x0_change = inside * x0_change
        more += momentum * (x0_change - x0_change_before)
    if NOISY:
        stepped += tl.load(number + 9) * tl.load(draws, mask, 0)
    return stepped + more, x0, x0_change


@triton.jit
def _x0_before(number, newest, outputs, x0_prev, first, step, mask, here, bound, CLIPPED: tl.constexpr,
               GIVEN: tl.constexpr):  # fmt: skip
    """x0 of the step before the first one, as it has been since the last sweep.

    newest, outputs: pointers to the first point's elements, outputs of the last sweep.
    """
    x0 = here
    if GIVEN:
        x0 = tl.load(x0_prev, mask, 0)
    if first > 0:
        x0 = tl.load(number - NUMBERS + 3) * tl.load(newest - step, mask, 0)
        x0 += tl.load(number - NUMBERS + 4) * tl.load(outputs - step, mask, 0)
        if CLIPPED:
            x0 = clamped(x0, bound)
    return x0


@triton.jit
def _give(
    given, value, next_rows, scale, position, given_branch, given_row, in_row, mask,
    SCALED: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Write a point into the network's next input, if it is a row of the next wave."""
    next_row = tl.load(next_rows + position)
    if next_row >= 0:
        scaled = value
        if SCALED:
            scaled = value * tl.load(scale + position)
        wanted = rounded(scaled, given.dtype.element_ty)
        for branch in tl.static_range(INPUTS):
            offset = tl.full([], branch, tl.int64) * given_branch + next_row.to(tl.int64) * given_row
            tl.store(given + offset + in_row, wanted, mask)


@triton.jit
def _settle(
    numbers, doubts, change, doubt, stationary, largest, total, first, window, sample, samples, full,
    POINTS: tl.constexpr,
):  # fmt: skip
    """The end of a sweep. largest: weighted movement of the point that moved most; total: zero if none moved."""
    left = tl.zeros([], doubt.dtype.element_ty)
    for first_row in range(0, window, POINTS):
        row = first_row + tl.arange(0, POINTS)
        at = row.to(tl.int64) * samples + sample
        reach = tl.load(numbers + (first + row) * NUMBERS + 10, row < window, 0)
        left += tl.sum(reach * tl.load(doubts + first * samples + at, row < window, 0), 0)
    tl.store(change + sample, largest)
    tl.store(doubt + sample, left)
    # an interpolated point may still move in the next sweep, even if it has not moved in this one
    tl.store(stationary + sample, ((total == 0) & (full > 0)).to(tl.int8))


@triton.jit
def _larger(largest, value):
    """A maximum that NaN wins."""
    return tl.where((value > largest) | (value != value), value, largest)


@triton.jit(do_not_specialize=["first", "window", "sweeps", "count", "samples", "full"])
def _walk(
    iterates, outputs, expected, numbers, draws, x0_prev, solved, doubts, level, next_rows, scale, given,
    sample_out, change, doubt, stationary,
    first, window, sweeps, count, samples, full, elements, step, iterate_stride, output_stride,
    given_branch, given_row, given_sample, given_inner, given_outer_stride, given_inner_stride,
    clip: tl.float64,
    ITERATES: tl.constexpr, OUTPUTS: tl.constexpr, H: tl.constexpr, CLIPPED: tl.constexpr, NOISY: tl.constexpr,
    MOMENTUM: tl.constexpr, GIVEN: tl.constexpr, SCALED: tl.constexpr, INPUTS: tl.constexpr,
    INPUT_DENSE: tl.constexpr, POINTS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = iterates.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    mask = lane < elements
    newest = ring_slot(iterates, sweeps, ITERATES, iterate_stride)
    written = ring_slot(iterates, sweeps + 1, ITERATES, iterate_stride)
    output_of = ring_slot(outputs, sweeps, OUTPUTS, output_stride)
    given += sample * given_sample
    in_row = offsets(lane, given_inner, given_outer_stride, given_inner_stride, INPUT_DENSE)
    bound = tl.full([BLOCK], clip, dtype)
    at = first.to(tl.int64) * step + sample * elements + lane
    number = numbers + first.to(tl.int64) * NUMBERS
    here = tl.load(newest + at, mask, 0)
    tl.store(written + at, here, mask)  # the sweep does not move its first point
    x0_before = here
    if MOMENTUM:
        x0_before = _x0_before(
            number, newest + at, ring_slot(outputs, sweeps + OUTPUTS - 1, OUTPUTS, output_stride) + at,
            x0_prev + sample * elements + lane if GIVEN else x0_prev, first, step, mask, here, bound, CLIPPED, GIVEN,
        )  # fmt: skip
    moved_by = tl.zeros([BLOCK], dtype)
    x0_change = tl.zeros([BLOCK], dtype)
    largest = tl.zeros([], dtype)
    total = tl.zeros([], dtype)
    if H > 0:
        solved += sample * H * H
    for i in tl.range(0, window, num_stages=STAGES):
        output = tl.load(output_of + at, mask, 0)
        following = tl.load(newest + at + step, mask, 0)
        response = tl.load(number + 5)
        carried = tl.zeros([BLOCK], dtype)
        if H > 0:
            moved = movements(iterates, at, here, mask, sweeps, count, iterate_stride, ITERATES, H)
            more = beyond(
                outputs, at, output, 0, False, moved, response, mask, sweeps, count, output_stride, OUTPUTS, H, False
            )
            along = ()
            for a in tl.static_range(H):
                along = along + (tl.sum(moved[a] * moved_by, 0),)
            for a in tl.static_range(H):
                weight = tl.load(solved + a * H) * along[0]
                for b in tl.static_range(1, H):
                    weight += tl.load(solved + a * H + b) * along[b]
                carried += more[a] * weight
            # the first point does not move, and what it has learnt may not be finite
            carried = tl.where(i > 0, carried, 0)
            solved += samples * H * H
        after, x0_before, x0_change = _stepped(
            number, here, output, draws + at if NOISY else draws, moved_by, carried, x0_before, x0_change,
            (first + i == 0) & (not GIVEN), bound, mask, CLIPPED, MOMENTUM, NOISY,
        )  # fmt: skip
        tl.store(expected + at, response * moved_by + carried, mask)
        at += step
        tl.store(written + at, after, mask)
        tl.store(sample_out + sample * elements + lane, after, mask & (i == window - 1))
        _give(given, after, next_rows, scale, first + i + 1, given_branch, given_row, in_row, mask, SCALED, INPUTS)
        moved_by = after - following
        summed = tl.sum(tl.abs(moved_by), 0)
        total += summed
        largest = _larger(largest, tl.load(level + first + i + 1) * (summed / tl.full([], elements, dtype)))
        here = following
        number += NUMBERS
    _settle(numbers, doubts, change, doubt, stationary, largest, total, first, window, sample, samples, full, POINTS)


@triton.jit(do_not_specialize=["first", "row", "window", "sweeps", "count", "samples", "parts", "tiles"])
def _step(
    iterates, outputs, expected, numbers, draws, x0_prev, solved, next_rows, scale, given, sample_out, along_sums,
    moved_sums, x0s,
    first, row, window, sweeps, count, samples, parts, tiles, elements, step, iterate_stride, output_stride,
    given_branch, given_row, given_sample, given_inner, given_outer_stride, given_inner_stride,
    clip: tl.float64,
    ITERATES: tl.constexpr, OUTPUTS: tl.constexpr, H: tl.constexpr, CLIPPED: tl.constexpr, NOISY: tl.constexpr,
    MOMENTUM: tl.constexpr, GIVEN: tl.constexpr, SCALED: tl.constexpr, INPUTS: tl.constexpr,
    INPUT_DENSE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of the walk, `row` points behind the first, of samples that several programs share."""
    dtype: tl.constexpr = iterates.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    part, sample = program % parts, program // parts
    place = (first.to(tl.int64) + row) * step + sample * elements
    newest = ring_slot(iterates, sweeps, ITERATES, iterate_stride)
    written = ring_slot(iterates, sweeps + 1, ITERATES, iterate_stride)
    output_of = ring_slot(outputs, sweeps, OUTPUTS, output_stride)
    given += sample * given_sample
    bound = tl.full([BLOCK], clip, dtype)
    number = numbers + (first.to(tl.int64) + row) * NUMBERS
    response = tl.load(number + 5)
    moves = row > 0
    along = ()
    if H > 0:
        solved += (row.to(tl.int64) * samples + sample) * H * H
        column = tl.arange(0, PARTS)
        for a in tl.static_range(H):
            of_parts = along_sums + ((row.to(tl.int64) * H + a) * samples + sample) * parts
            along = along + (tl.sum(tl.load(of_parts + column, (column < parts) & moves, 0), 0),)
    # the movement of the next point, and the products of its earlier movements with it
    sums = (tl.zeros([], dtype),)
    for _ in tl.static_range(H):
        sums = sums + (tl.zeros([], dtype),)
    for tile in range(tiles):
        start = (part * tiles + tile) * BLOCK
        lane = tl.arange(0, BLOCK)
        mask = lane < elements - start
        at = place + start + lane
        here = tl.load(newest + at, mask, 0)
        moved_by = tl.where(moves, tl.load(written + at, mask & moves, 0) - here, 0)
        tl.store(written + at, here, mask & (row == 0))  # the sweep does not move its first point
        output = tl.load(output_of + at, mask, 0)
        following = tl.load(newest + at + step, mask, 0)
        carried = tl.zeros([BLOCK], dtype)
        if H > 0:
            moved = movements(iterates, at, here, mask, sweeps, count, iterate_stride, ITERATES, H)
            more = beyond(
                outputs, at, output, 0, False, moved, response, mask, sweeps, count, output_stride, OUTPUTS, H, False
            )
            for a in tl.static_range(H):
                weight = tl.load(solved + a * H) * along[0]
                for b in tl.static_range(1, H):
                    weight += tl.load(solved + a * H + b) * along[b]
                carried += more[a] * weight
            # the first point does not move, and what it has learnt may not be finite
            carried = tl.where(moves, carried, 0)
        x0_before = here
        x0_change = moved_by
        if MOMENTUM:
            # x0 and its change: read what the step before has kept, and write beside it
            kept = x0s + (row % 2).to(tl.int64) * 2 * step + sample * elements + start + lane
            x0_before = _x0_before(
                number, newest + at, ring_slot(outputs, sweeps + OUTPUTS - 1, OUTPUTS, output_stride) + at,
                x0_prev + sample * elements + start + lane if GIVEN else x0_prev, first, step, mask & (row == 0), here,
                bound, CLIPPED, GIVEN,
            )  # fmt: skip
            x0_before = tl.where(moves, tl.load(kept, mask & moves, 0), x0_before)
            x0_change = tl.load(kept + step, mask & moves, 0)
        after, x0, x0_change = _stepped(
            number, here, output, draws + at if NOISY else draws, moved_by, carried, x0_before, x0_change,
            (first + row == 0) & (not GIVEN), bound, mask, CLIPPED, MOMENTUM, NOISY,
        )  # fmt: skip
        if MOMENTUM:
            kept = x0s + ((row + 1) % 2).to(tl.int64) * 2 * step + sample * elements + start + lane
            tl.store(kept, x0, mask)
            tl.store(kept + step, x0_change, mask)
        tl.store(expected + at, response * moved_by + carried, mask)
        at += step
        tl.store(written + at, after, mask)
        tl.store(sample_out + sample * elements + start + lane, after, mask & (row == window - 1))
        in_row = offsets(start.to(tl.int32) + lane, given_inner, given_outer_stride, given_inner_stride, INPUT_DENSE)
        _give(given, after, next_rows, scale, first + row + 1, given_branch, given_row, in_row, mask, SCALED, INPUTS)
        moved_by = after - following
        added = (sums[0] + tl.sum(tl.abs(moved_by), 0),)
        if H > 0:
            # the last point is where no step departs
            inner = mask & (row < window - 1)
            moved = movements(iterates, at, following, inner, sweeps, count, iterate_stride, ITERATES, H)
            for a in tl.static_range(H):
                added = added + (sums[1 + a] + tl.sum(moved[a] * moved_by, 0),)
        sums = added
    tl.store(moved_sums + (row.to(tl.int64) * samples + sample) * parts + part, sums[0])
    if row < window - 1:
        for a in tl.static_range(H):
            of_parts = along_sums + (((row.to(tl.int64) + 1) * H + a) * samples + sample) * parts
            tl.store(of_parts + part, sums[1 + a])


@triton.jit(do_not_specialize=["first", "window", "samples", "parts", "full"])
def _end(
    numbers, doubts, level, moved_sums, change, doubt, stationary,
    first, window, samples, parts, full, elements,
    POINTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The end of a sweep whose steps were launches; one program a sample."""
    dtype: tl.constexpr = doubts.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PARTS)
    largest = tl.zeros([], dtype)
    total = tl.zeros([], dtype)
    moved_sums += sample * parts
    for row in range(window):
        summed = tl.sum(tl.load(moved_sums + column, column < parts, 0), 0)
        moved_sums += samples * parts
        total += summed
        largest = _larger(largest, tl.load(level + first + row + 1) * (summed / tl.full([], elements, dtype)))
    _settle(numbers, doubts, change, doubt, stationary, largest, total, first, window, sample, samples, full, POINTS)


def secant_sweep(
    table: SecantTable,
    number: int,
    memory: Memory,
    m: Tensor,
    guidance: Tensor | None,
    network: NetworkInput,
    check_stationary: bool,
) -> SweepResult:
    """See `secant_sweep` of the package; two launches, or for large samples one a step and three more."""
    wave, states = table.waves[number], memory.states(0)
    m, layout_of_m = with_inner_layout(m, states)
    _, samples, elements = memory.expected.shape
    first, window, history = wave.first, table.num_steps - wave.first, table.history
    how = sharing(elements, states.dtype, history)
    given = network.empty(0 if wave.next_positions is None else len(wave.next_positions), states[0])
    _, layout = with_inner_layout(given, states)
    new = states.new_empty
    sample, change, doubt = new(states.shape[1:]), new(samples), new(samples)
    stationary = torch.empty(samples, dtype=torch.bool, device=states.device)
    momentum, noisy = table.momentum is not None, table.spread is not None
    draws, x0_prev = memory.draws if noisy else None, memory.x0_prev if momentum else None
    of_given = len(given) // network.branches * given.stride(0), given.stride(0), given.stride(1), *layout
    rings = samples * elements, memory.iterates.stride(0), memory.outputs.stride(0)
    clip, count = 0.0 if table.clip is None else table.clip, table.differences(memory.sweeps)
    points, full = min(triton.next_power_of_2(table.num_steps), POINTS), int(wave.full)
    options = {
        "ITERATES": len(memory.iterates), "OUTPUTS": len(memory.outputs), "H": history,
        "CLIPPED": table.clip is not None, "NOISY": noisy, "MOMENTUM": momentum, "GIVEN": x0_prev is not None,
        "SCALED": table.input_scale is not None, "INPUTS": network.branches,
        "INPUT_DENSE": layout == (elements, 0, 1), "BLOCK": how.block, "num_warps": how.warps,
        "maxnreg": REGISTERS,
        # round as the reference and the scheduler's own step do, to the bit
        "enable_fp_fusion": False,
    }  # fmt: skip
    with torch.cuda.device_of(states):  # Triton launches on the current device
        solved = learn(table, wave, memory, m, layout_of_m, guidance, how)
        if how.whole:
            _walk[(samples,)](
                memory.iterates, memory.outputs, memory.expected, table.numbers, draws, x0_prev, solved,
                memory.doubts, table.weight, wave.next_rows, table.input_scale, given, sample, change, doubt,
                stationary.view(torch.int8),
                first, window, memory.sweeps, count, samples, full, elements, *rings, *of_given,
                clip,
                POINTS=points, STAGES=STAGES, **options,
            )  # fmt: skip
        else:
            along, moved = (
                new(window, history, samples, how.parts) if history else None,
                new(window, samples, how.parts),
            )
            # of every other step: x0 and its change
            x0s, parts = new(2, 2, samples, elements) if momentum else None, triton.next_power_of_2(how.parts)
            for row in range(window):
                _step[(samples * how.parts,)](
                    memory.iterates, memory.outputs, memory.expected, table.numbers, draws, x0_prev, solved,
                    wave.next_rows, table.input_scale, given, sample, along, moved, x0s,
                    first, row, window, memory.sweeps, count, samples, how.parts, how.tiles, elements, *rings,
                    *of_given,
                    clip,
                    PARTS=parts, **options,
                )  # fmt: skip
            _end[(samples,)](
                table.numbers, memory.doubts, table.weight, moved, change, doubt, stationary.view(torch.int8),
                first, window, samples, how.parts, full, elements,
                POINTS=points, PARTS=parts, num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
    memory.sweeps += 1
    next_input = None if wave.next_positions is None else given
    return SweepResult(sample, change, doubt, stationary if check_stationary else None, next_input)
