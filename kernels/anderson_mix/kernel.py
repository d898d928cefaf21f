"""The mixing in two launches: inner products and weights, then the update."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on_device_of
from ..resources import Specimen

BLOCK = 1024
NUM_WARPS = 4
# programs of the first launch, about: each takes more tiles of one position where there would be more
PROGRAMS = 1024
# window positions that the last program of a sample takes at once, at most, and partial sums of all of them
POSITIONS = 256
REDUCED = 512


@triton.jit(do_not_specialize=["window", "programs", "tiles_each"])
def _gram(
    residual,
    dr,
    partials,
    prefixes,
    weights,
    tickets,
    window,
    elements,
    programs,
    tiles_each,
    residual_step,
    residual_sample,
    dr_history,
    dr_step,
    dr_sample,
    regularisation: tl.float64,
    H: tl.constexpr,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PAIRS: tl.constexpr = H * (H + 1) // 2 + H
    program = tl.program_id(0).to(tl.int64)
    part = program % programs
    position = program // programs % window
    sample = program // programs // window
    residual += position * residual_step + sample * residual_sample
    dr += position * dr_step + sample * dr_sample

    # lower triangle of the Gram matrix row by row, then the right-hand side
    sums = ()
    for _ in tl.static_range(PAIRS):
        sums = sums + (tl.zeros([], tl.float64),)
    for number in range(tiles_each):
        first = (part * tiles_each + number) * BLOCK
        lane = tl.arange(0, BLOCK)
        mask = lane < elements - first
        vectors = ()
        for a in tl.static_range(H):
            offset = tl.full([], a, tl.int64) * dr_history
            vectors = vectors + (tl.load(dr + offset + first + lane, mask, 0).to(tl.float64),)
        vectors = vectors + (tl.load(residual + first + lane, mask, 0).to(tl.float64),)
        added = ()
        for a in tl.static_range(H):
            for b in tl.static_range(a + 1):
                added = added + (sums[a * (a + 1) // 2 + b] + tl.sum(vectors[a] * vectors[b], 0),)
        for a in tl.static_range(H):
            added = added + (sums[PAIRS - H + a] + tl.sum(vectors[a] * vectors[H], 0),)
        sums = added
    partials += sample * PAIRS * window * programs
    for number_of_sum in tl.static_range(PAIRS):
        tl.store(partials + (number_of_sum * window + position) * programs + part, sums[number_of_sum])

    prefixes += sample * PAIRS * window
    weights += sample * window * H
    weights_of_last(
        partials, prefixes, weights, tickets + sample, window, programs, regularisation, H, POSITIONS, COLUMNS
    )


@triton.jit
def weights_of_last(
    partials,
    prefixes,
    weights,
    ticket,
    window,
    programs,
    regularisation,
    H: tl.constexpr,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The last program of a sample sums what all have left, along the window too, and solves for the weights."""
    PAIRS: tl.constexpr = H * (H + 1) // 2 + H
    # every thread's sums are written before the ticket is drawn
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == window * programs - 1:
        tl.store(ticket, 0)
        for pair in range(PAIRS):
            carried = tl.zeros([], tl.float64)
            for first_position in range(0, window, POSITIONS):
                row = first_position + tl.arange(0, POSITIONS)
                place = pair * window + row.to(tl.int64)
                total = tl.zeros([POSITIONS, COLUMNS], tl.float64)
                for first_part in range(0, programs, COLUMNS):
                    column = first_part + tl.arange(0, COLUMNS)
                    inside = (row < window)[:, None] & (column < programs)[None, :]
                    point = partials + place[:, None] * programs + column[None, :]
                    total += tl.load(point, inside, 0, cache_modifier=".cg")
                at_position = tl.sum(total, 1)
                tl.store(prefixes + place, carried + tl.cumsum(at_position, 0), row < window)
                carried += tl.sum(at_position, 0)
        # other threads than the writers read the prefix sums
        tl.debug_barrier()
        for first_position in range(0, window, POSITIONS):
            row = first_position + tl.arange(0, POSITIONS)
            _solve(prefixes, weights, row, window, regularisation, H)


@triton.jit
def _solve(prefixes, weights, row, window, regularisation, H: tl.constexpr):
    """Solve for the weights of a vector of positions, each by its own LDL^T decomposition, unrolled."""
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


@triton.jit(do_not_specialize=["window", "tiles"])
def _mix(
    x,
    residual,
    dx,
    dr,
    weights,
    out,
    window,
    elements,
    tiles,
    x_step,
    x_sample,
    residual_step,
    residual_sample,
    dx_history,
    dx_step,
    dx_sample,
    dr_history,
    dr_step,
    dr_sample,
    out_step,
    out_sample,
    H: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program % tiles * BLOCK
    position = program // tiles % window
    sample = program // tiles // window
    lane = tl.arange(0, BLOCK)
    mask = lane < elements - first
    mixed = tl.load(x + position * x_step + sample * x_sample + first + lane, mask)
    mixed += tl.load(residual + position * residual_step + sample * residual_sample + first + lane, mask)
    if position >= FIRST:
        dx += position * dx_step + sample * dx_sample + first
        dr += position * dr_step + sample * dr_sample + first
        weights += (sample * window + position) * H
        correction = tl.zeros([BLOCK], x.dtype.element_ty)
        for a in tl.static_range(H):
            number = tl.full([], a, tl.int64)
            both = tl.load(dx + number * dx_history + lane, mask) + tl.load(dr + number * dr_history + lane, mask)
            correction += tl.load(weights + a) * both
        mixed -= correction
    tl.store(out + position * out_step + sample * out_sample + first + lane, mixed, mask)


def anderson_mix(
    x: Tensor,
    residual: Tensor,
    dx: Tensor,
    dr: Tensor,
    *,
    regularisation: float,
    frontier: bool,
    out: Tensor,
    counts: Tensor,
) -> None:
    """Launch both. Writes out."""
    history, window, samples = dr.shape[:3]
    elements = dr[0, 0, 0].numel()
    tiles = triton.cdiv(elements, BLOCK)
    gram_tiles = triton.cdiv(elements, _gram_block(history))
    tiles_each = triton.cdiv(gram_tiles, max(1, PROGRAMS // (window * samples)))
    programs = triton.cdiv(gram_tiles, tiles_each)
    positions = min(max(triton.next_power_of_2(window), 16), POSITIONS)
    pairs = history * (history + 1) // 2 + history
    partials = x.new_empty(samples, pairs, window, programs, dtype=torch.float64)
    prefixes = x.new_empty(samples, pairs, window, dtype=torch.float64)
    weights = x.new_empty(samples, window, history)
    with on_device_of(x):
        _gram[(samples * window * programs,)](
            residual,
            dr,
            partials,
            prefixes,
            weights,
            counts,
            window,
            elements,
            programs,
            tiles_each,
            *residual.stride()[:2],
            *dr.stride()[:3],
            regularisation,
            H=history,
            POSITIONS=positions,
            COLUMNS=REDUCED // positions,
            BLOCK=_gram_block(history),
            num_warps=NUM_WARPS,
        )
        _mix[(samples * window * tiles,)](
            x,
            residual,
            dx,
            dr,
            weights,
            out,
            window,
            elements,
            tiles,
            *x.stride()[:2],
            *residual.stride()[:2],
            *dx.stride()[:3],
            *dr.stride()[:3],
            *out.stride()[:2],
            H=history,
            FIRST=int(frontier),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            # the roundings of the reference to the bit
            enable_fp_fusion=False,
        )


def _gram_block(history: int) -> int:
    """Elements of a tile of the inner products: every vector of it is in registers."""
    return BLOCK if history <= 2 else BLOCK // 2


def _specimens(history: int, gram_registers: int, mix_registers: int) -> list[Specimen]:
    tensors = dict.fromkeys(("x", "residual", "dx", "dr", "weights", "out"), "*fp32")
    tensors |= {"partials": "*fp64", "prefixes": "*fp64", "tickets": "*i32", "regularisation": "fp64"}
    sums = {"POSITIONS": POSITIONS, "COLUMNS": REDUCED // POSITIONS}

    def specimen(
        kernel: triton.JITFunction, block: int, most_registers: int, loaded: int, stored: int, **constants: int
    ) -> Specimen:
        constants |= {"H": history, "BLOCK": block}
        signature = {name: tensors.get(name, "i32") for name in kernel.arg_names if name not in constants}
        accesses = block // (32 * NUM_WARPS) * 32 // 128
        wide = (loaded * accesses, stored * accesses)
        name = f"{kernel.__name__.strip('_')}, {history} differences"
        # the inner products may fuse: nothing is compared with them bit by bit
        return Specimen(name, kernel, signature, constants, NUM_WARPS, most_registers, wide, fuses=kernel is _gram)

    return [
        specimen(_gram, _gram_block(history), gram_registers, history + 1, 0, **sums),
        specimen(_mix, BLOCK, mix_registers, 2 * history + 2, 1, FIRST=1),
    ]


SPECIMENS = [
    each
    for history, gram_registers, mix_registers in ((1, 64, 48), (2, 100, 56), (4, 136, 64), (5, 176, 64))
    for each in _specimens(history, gram_registers, mix_registers)
]
