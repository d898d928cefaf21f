"""The first launch of a sweep: outputs, doubts, and what each point has learnt of its response; all points at once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.arithmetic import combined, offsets, ring_slot
from ..common.layout import Inner
from .memory import Memory
from .sizes import REGISTERS, Sharing
from .table import LOCAL, SecantTable, SecantWave

# of each step: a, b, e, p, q, response, largest, smallest, momentum, spread, reach
NUMBERS = tl.constexpr(11)
_LOCAL = tl.constexpr(LOCAL)
_PLACES = tl.constexpr(2 + 2 * LOCAL)


@triton.jit
def movements(
    iterates, at, here, mask, sweeps, count, iterate_stride, ITERATES: tl.constexpr, H: tl.constexpr
):  # fmt: skip
    """Differences of a point between the last waves, H of them, the oldest first; zero where there is none yet."""
    found = ()
    older = tl.load(ring_slot(iterates, sweeps + ITERATES - H, ITERATES, iterate_stride) + at, mask & (count >= H), 0)
    for a in tl.static_range(H):
        if a == H - 1:
            newer = here
        else:
            slot = ring_slot(iterates, sweeps + ITERATES - H + 1 + a, ITERATES, iterate_stride)
            newer = tl.load(slot + at, mask & (count >= H - 1 - a), 0)
        found = found + (tl.where(count >= H - a, newer - older, 0),)
        older = newer
    return found


@triton.jit
def beyond(
    outputs, at, output, own, is_new, moved, response, mask, sweeps, count, output_stride,
    OUTPUTS: tl.constexpr, H: tl.constexpr, VISITS: tl.constexpr,
):  # fmt: skip
    """What the outputs of a point changed by beyond its response times the movements.

    own: what is added to the outputs of earlier waves; VISITS: write them, where the point is new.
    """
    found = ()
    slot = ring_slot(outputs, sweeps + OUTPUTS - H, OUTPUTS, output_stride) + at
    older = tl.load(slot, mask & (count >= H), 0)
    if VISITS:
        older += own
        tl.store(slot, older, mask & is_new & (count >= H))
    for a in tl.static_range(H):
        if a == H - 1:
            newer = output
        else:
            slot = ring_slot(outputs, sweeps + OUTPUTS - H + 1 + a, OUTPUTS, output_stride) + at
            newer = tl.load(slot, mask & (count >= H - 1 - a), 0)
            if VISITS:
                newer += own
                tl.store(slot, newer, mask & is_new & (count >= H - 1 - a))
        found = found + (tl.where(count >= H - a, (newer - older) - response * moved[a], 0),)
        older = newer
    return found


@triton.jit
def _inverse(matrix, H: tl.constexpr):
    """The inverse of a positive definite matrix, row by row, by elimination in its place."""
    for k in tl.static_range(H):
        pivot = 1.0 / matrix[k * H + k]
        changed = ()
        for row in tl.static_range(H):
            for column in tl.static_range(H):
                if row == k:
                    if column == k:
                        entry = pivot
                    else:
                        entry = matrix[k * H + column] * pivot
                else:
                    if column == k:
                        entry = -matrix[row * H + k] * pivot
                    else:
                        entry = matrix[row * H + column] - matrix[row * H + k] * (matrix[k * H + column] * pivot)
                changed = changed + (entry,)
        matrix = changed
    return matrix


@triton.jit
def _finish(
    sums, numbers, places, doubts, solved, first, row, sample, samples, elements, regularisation, H: tl.constexpr,
):  # fmt: skip
    """From the sums over the elements of a point: its doubt, and the weights of its secants."""
    dtype: tl.constexpr = doubts.dtype.element_ty
    number = numbers + (first + row) * NUMBERS
    size = tl.full([], elements, dtype)
    doubt = tl.load(doubts + (first + row) * samples + sample) + sums[0] / size
    tl.store(doubts + (first + row) * samples + sample, tl.where(tl.load(places + row * _PLACES) >= 0, 0, doubt))
    if H > 0:
        # squared norms of movements are the diagonal of the Gram matrix, row a of its lower triangle begins at a(a+1)/2
        largest_squared = sums[1 + H]
        for a in tl.static_range(1, H):
            squared = sums[1 + H + a * (a + 1) // 2 + a]
            # a maximum ignores NaN, which must go on
            largest_squared = tl.where((squared > largest_squared) | (squared != squared), squared, largest_squared)
        ridge = tl.full([], regularisation, dtype) * largest_squared + size * tl.load(number + 7)
        matrix = ()
        for a in tl.static_range(H):
            for b in tl.static_range(H):
                if a == b:
                    entry = sums[1 + H + a * (a + 1) // 2 + a] + ridge
                elif a > b:
                    entry = sums[1 + H + a * (a + 1) // 2 + b]
                else:
                    entry = sums[1 + H + b * (b + 1) // 2 + a]
                matrix = matrix + (entry,)
        inverse = _inverse(matrix, H)
        solved += (row * samples + sample) * H * H
        for a in tl.static_range(H):
            # no response may be larger than what the level of noise allows
            bound = tl.load(number + 6) * tl.sqrt(sums[1 + H + a * (a + 1) // 2 + a])
            norm = tl.sqrt(sums[1 + a])
            shorter = tl.where(norm > bound, bound / tl.where(norm > bound, norm, 1.0), 1.0)
            for b in tl.static_range(H):
                tl.store(solved + a * H + b, shorter * inverse[a * H + b])


@triton.jit(do_not_specialize=["first", "window", "sweeps", "count", "parts", "tiles", "samples"])
def _learn(
    iterates, outputs, expected, m, guidance, numbers, places, weights, doubts, solved, partials,
    first, window, sweeps, count, parts, tiles, samples, elements, step, iterate_stride, output_stride,
    m_branch, m_row, m_sample, m_inner, m_outer_stride, m_inner_stride,
    regularisation: tl.float64,
    ITERATES: tl.constexpr, OUTPUTS: tl.constexpr, H: tl.constexpr, BRANCHES: tl.constexpr, GUIDED: tl.constexpr,
    SPARSE: tl.constexpr, DENSE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = iterates.dtype.element_ty
    PAIRS: tl.constexpr = H * (H + 1) // 2
    SUMS: tl.constexpr = 1 + H + PAIRS
    program = tl.program_id(0).to(tl.int64)
    part, sample, row = program % parts, program // parts % samples, program // parts // samples
    place = (first + row) * step + sample * elements
    asked = tl.load(places + row * _PLACES).to(tl.int64)
    is_new = tl.load(places + row * _PLACES + 1) > 0
    response = tl.load(numbers + (first + row) * NUMBERS + 5)
    before = ring_slot(outputs, sweeps + OUTPUTS - 1, OUTPUTS, output_stride)
    written = ring_slot(outputs, sweeps, OUTPUTS, output_stride)
    newest = ring_slot(iterates, sweeps, ITERATES, iterate_stride)
    m += sample * m_sample

    # differences of interpolations, squared norms of what outputs changed by beyond responses, the lower triangle of
    # the Gram matrix row by row
    sums = ()
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.zeros([], dtype),)
    for number in range(tiles):
        start = (part * tiles + number) * BLOCK
        lane = tl.arange(0, BLOCK)
        mask = lane < elements - start
        at = place + start + lane
        if DENSE:
            in_row = start + lane
        else:
            in_row = offsets(start.to(tl.int32) + lane, m_inner, m_outer_stride, m_inner_stride, False)
        output = tl.load(before + at, mask, 0) + tl.load(expected + at, mask, 0)
        added = (sums[0],)
        if SPARSE:
            # surprises of the nodes around the point are carried to it
            carried = tl.zeros([BLOCK], dtype)
            differ = tl.zeros([BLOCK], dtype)
            for k in tl.static_range(_LOCAL):
                node = tl.load(places + row * _PLACES + 2 + k).to(tl.int64)
                position = tl.load(places + row * _PLACES + 2 + _LOCAL + k).to(tl.int64)
                at_node = position * step + sample * elements + start + lane
                surprise = combined(m + node * m_row + in_row, m_branch, guidance, mask, BRANCHES, GUIDED, dtype)
                surprise -= tl.load(before + at_node, mask, 0) + tl.load(expected + at_node, mask, 0)
                carried += tl.load(weights + row * 2 * _LOCAL + k) * surprise
                differ += tl.load(weights + row * 2 * _LOCAL + _LOCAL + k) * surprise
            added = (sums[0] + tl.sum(tl.abs(differ), 0),)
            output += carried
        is_row = asked >= 0
        at_row = m + tl.maximum(asked, 0) * m_row + in_row
        got = combined(at_row, m_branch, guidance, mask & is_row, BRANCHES, GUIDED, dtype)
        own = tl.where(is_new, got - output, 0)
        output = tl.where(is_row, got, output)
        tl.store(written + at, output, mask)
        if H > 0:
            here = tl.load(newest + at, mask, 0)
            moved = movements(iterates, at, here, mask, sweeps, count, iterate_stride, ITERATES, H)
            more = beyond(
                outputs, at, output, own, is_new, moved, response, mask, sweeps, count, output_stride, OUTPUTS, H, True
            )
            for a in tl.static_range(H):
                added = added + (sums[1 + a] + tl.sum(more[a] * more[a], 0),)
            for a in tl.static_range(H):
                for b in tl.static_range(a + 1):
                    added = added + (sums[1 + H + a * (a + 1) // 2 + b] + tl.sum(moved[a] * moved[b], 0),)
        sums = added
    if WHOLE:
        _finish(sums, numbers, places, doubts, solved, first, row, sample, samples, elements, regularisation, H)
    else:
        for k in tl.static_range(SUMS):
            tl.store(partials + ((k * window + row) * samples + sample) * parts + part, sums[k])


@triton.jit(do_not_specialize=["first", "window", "parts", "samples"])
def _solve(
    numbers, places, doubts, solved, partials,
    first, window, parts, samples, elements,
    regularisation: tl.float64,
    H: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program a point and sample adds up what the programs of `_learn` have summed."""
    SUMS: tl.constexpr = 1 + H + H * (H + 1) // 2
    program = tl.program_id(0).to(tl.int64)
    sample, row = program % samples, program // samples
    lane = tl.arange(0, PARTS)
    sums = ()
    for k in tl.static_range(SUMS):
        of_parts = partials + ((k * window + row) * samples + sample) * parts
        sums = sums + (tl.sum(tl.load(of_parts + lane, lane < parts, 0), 0),)
    _finish(sums, numbers, places, doubts, solved, first, row, sample, samples, elements, regularisation, H)


def learn(
    table: SecantTable,
    wave: SecantWave,
    memory: Memory,
    m: Tensor,
    layout: Inner,
    guidance: Tensor | None,
    how: Sharing,
) -> Tensor | None:
    """Write the outputs and doubts; one launch, two where several programs share a sample.

    m: network's output, whose states lie as `layout` says.

    Returns:
        the weights of the secants, [points, samples, H, H]: with these the responses are U weights S'. None without
        history.
    """
    history, window, rows = table.history, table.num_steps - wave.first, len(wave.positions)
    _, samples, elements = memory.expected.shape
    new = memory.expected.new_empty
    solved = new(window, samples, history, history) if history else None
    partials = None if how.whole else new(1 + history + history * (history + 1) // 2, window, samples, how.parts)
    _learn[(window * samples * how.parts,)](
        memory.iterates, memory.outputs, memory.expected, m, guidance, table.numbers, wave.around.places,
        wave.around.weights, memory.doubts, solved, partials,
        wave.first, window, memory.sweeps, table.differences(memory.sweeps), how.parts, how.tiles, samples, elements,
        samples * elements, memory.iterates.stride(0), memory.outputs.stride(0),
        rows * m.stride(0), m.stride(0), m.stride(1), *layout,
        table.regularisation,
        ITERATES=len(memory.iterates), OUTPUTS=len(memory.outputs), H=history,
        BRANCHES=1 if guidance is None else len(guidance), GUIDED=guidance is not None,
        SPARSE=wave.interpolation is not None, DENSE=layout == (elements, 0, 1), WHOLE=how.whole, BLOCK=how.block,
        num_warps=how.warps, maxnreg=REGISTERS,
        enable_fp_fusion=False,
    )  # fmt: skip
    if partials is not None:
        _solve[(window * samples,)](
            table.numbers, wave.around.places, memory.doubts, solved, partials,
            wave.first, window, how.parts, samples, elements,
            table.regularisation,
            H=history, PARTS=triton.next_power_of_2(how.parts),
            num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return solved
