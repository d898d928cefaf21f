"""The update as one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.arithmetic import clamped, offsets, rounded, total
from ..common.layout import with_inner_layout
from ..common.network_input import NetworkInput
from .buffers import Buffers, Scratch
from .instructions import NUM_NUMBERS, NUM_WORDS
from .table import WaveTable

# Elements that a program takes at a time. Large states: 8 a thread, so that half-precision rows move 16 bytes at once.
# Small states: 4 a thread, which gives twice the programs.
LARGE_BLOCK, SMALL_BLOCK = 1024, 512
LARGE_STATE = 2**16
NUM_WARPS = 4
# Without this limit the assembler aims at 56 or 64 registers and spills a few. With 80, 24 warps fit a multiprocessor,
# which keeps memory busy.
REGISTERS = {torch.float32: 80, torch.float64: 128}
# The most programs side by side along a state; with larger states each takes several blocks. A constant, so that the
# change is summed in the same order on every device.
MOST_PROGRAMS = 1024

_WORDS = tl.constexpr(NUM_WORDS)
_NUMBERS = tl.constexpr(NUM_NUMBERS)


@triton.jit(do_not_specialize=["number", "rows", "input_rows"])
def wave_update_kernel(
    memory_ptr, m_ptr, noise_ptr, guidance_ptr, input_ptr,
    words_ptr, numbers_ptr, starts_ptr, first_ptr, measured_ptr,  # see `instructions.Chains`
    change_ptr, moved_ptr, partial_ptr, ticket_ptr,
    number, rows, input_rows, elements, slot_stride,
    m_row_stride, m_sample_stride, m_inner, m_outer_stride, m_inner_stride,
    input_row_stride, input_sample_stride, input_inner, input_outer_stride, input_inner_stride,
    HAS_M: tl.constexpr, BRANCHES: tl.constexpr, GUIDED: tl.constexpr, CLIPS: tl.constexpr, LOOKS_BACK: tl.constexpr,
    HAS_NOISE: tl.constexpr, RECORDS_MOVED: tl.constexpr, GATHERS: tl.constexpr, INPUTS: tl.constexpr,
    M_DENSE: tl.constexpr, INPUT_DENSE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # the chains of one block of elements run side by side: what several of them read comes from the cache
    sample, chain, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    samples, programs = tl.num_programs(0), tl.num_programs(2)
    first_entry = tl.load(measured_ptr + 3 * number)
    first_chain = tl.load(first_ptr + number)
    tickets = 0
    if first_chain + chain < tl.load(first_ptr + number + 1):
        start = tl.load(starts_ptr + first_chain + chain)
        stop = tl.load(starts_ptr + first_chain + chain + 1)
        in_sample = sample.to(tl.int64) * elements
        for i in range(start, stop):
            word = words_ptr + i * _WORDS
            state = tl.load(word).to(tl.int64)
            row = tl.load(word + 1)
            before = tl.load(word + 2).to(tl.int64)
            draw = tl.load(word + 3).to(tl.int64)
            new = tl.load(word + 4).to(tl.int64)
            old = tl.load(word + 5).to(tl.int64)
            keep = tl.load(word + 6).to(tl.int64)
            input_row = tl.load(word + 7)
            compare = tl.load(word + 8).to(tl.int64)
            iteration = tl.load(word + 9)
            change = tl.load(word + 10)
            coefficient = numbers_ptr + i * _NUMBERS
            a = tl.load(coefficient)
            b = tl.load(coefficient + 1)
            c = tl.load(coefficient + 2)
            d = tl.load(coefficient + 3)
            s = tl.load(coefficient + 4)
            p = tl.load(coefficient + 5)
            q = tl.load(coefficient + 6)
            clip = tl.load(coefficient + 7)
            scale = tl.load(coefficient + 8)
            distance = tl.zeros((BLOCK,), memory_ptr.dtype.element_ty)
            differs = tl.zeros((BLOCK,), tl.int32)
            for block in range(program, tl.cdiv(elements, BLOCK), programs):
                element = block * BLOCK + tl.arange(0, BLOCK)
                inside = element < elements
                here = memory_ptr + in_sample + element
                x = tl.load(here + state * slot_stride, mask=inside, other=0.0)
                value = a * x
                if HAS_M:
                    from_network = inside & (row >= 0)
                    m_at = sample.to(tl.int64) * m_sample_stride
                    m_at += offsets(element, m_inner, m_outer_stride, m_inner_stride, M_DENSE)
                    m = tl.zeros((BLOCK,), memory_ptr.dtype.element_ty)
                    first = m
                    for branch in tl.static_range(BRANCHES):
                        m_row = (branch * rows + row).to(tl.int64) * m_row_stride
                        of_branch = tl.load(m_ptr + m_row + m_at, mask=from_network, other=0.0)
                        of_branch = of_branch.to(memory_ptr.dtype.element_ty)
                        if branch > 0:  # see `network_input.guided`
                            m += tl.load(guidance_ptr + branch) * (of_branch - first)
                        else:
                            first = of_branch
                            m = total(guidance_ptr, BRANCHES) * first if GUIDED else first
                    value += b * m
                    if CLIPS:
                        value += tl.where(row >= 0, c * clamped(p * x + q * m, clip), 0.0)
                if LOOKS_BACK:
                    value += d * tl.load(here + before * slot_stride, mask=inside & (before >= 0), other=0.0)
                if HAS_NOISE:
                    z_at = noise_ptr + draw * slot_stride + in_sample + element
                    value += s * tl.load(z_at, mask=inside & (draw >= 0), other=0.0)
                jump = tl.load(here + new * slot_stride, mask=inside & (new >= 0), other=0.0)
                value += jump - tl.load(here + old * slot_stride, mask=inside & (new >= 0), other=0.0)
                tl.store(here + keep * slot_stride, value, mask=inside & (keep >= 0))
                if GATHERS:
                    input_at = sample.to(tl.int64) * input_sample_stride
                    input_at += offsets(element, input_inner, input_outer_stride, input_inner_stride, INPUT_DENSE)
                    given = rounded(scale * value, input_ptr.dtype.element_ty)
                    for branch in tl.static_range(INPUTS):
                        row_at = (branch * input_rows + input_row).to(tl.int64) * input_row_stride
                        tl.store(input_ptr + row_at + input_at, given, mask=inside & (input_row >= 0))
                compared = inside & (compare >= 0)
                previous = tl.load(here + compare * slot_stride, mask=compared, other=0.0)
                distance += tl.where(compared, tl.abs(value - previous), 0.0)
                differs |= (compared & (value != previous)).to(tl.int32)
            if RECORDS_MOVED:
                tl.store(moved_ptr + iteration * samples + sample, 1, mask=tl.max(differs, 0) > 0)
            if change >= 0:
                partial = ((change - first_entry) * samples + sample) * programs + program
                tl.store(partial_ptr + partial, tl.sum(distance, 0))
                tickets = programs * samples * tl.load(measured_ptr + 3 * number + 2)
            # barrier: the next instruction may read this write from another thread
            tl.debug_barrier()
    if tickets > 0:
        tl.debug_barrier()
        if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tickets - 1:
            # the last program: all others have written their part
            part = tl.arange(0, PARTS)
            # load these again instead of keeping them in registers
            first_entry = tl.load(measured_ptr + 3 * number)
            last_entry = tl.load(measured_ptr + 3 * number + 1)
            for entry in range(first_entry, last_entry + 1):
                for of_sample in range(samples):
                    parts = partial_ptr + ((entry - first_entry) * samples + of_sample) * programs + part
                    mean = tl.sum(tl.load(parts, mask=part < programs, other=0.0, cache_modifier=".cg"), 0) / elements
                    tl.store(change_ptr + entry * samples + of_sample, mean)
            tl.store(ticket_ptr, 0)


def wave_update(
    table: WaveTable, number: int, buffers: Buffers, m: Tensor | None, guidance: Tensor | None, network: NetworkInput
) -> Tensor | None:
    """See `srds_fast.kernels.wave_update.wave_update`."""
    chains, memory = table.chains, buffers.memory
    if buffers.scratch is None:
        buffers.scratch = _scratch(table, buffers)
    scratch, gathers, elements = buffers.scratch, len(table.updates[number].gathers), memory[0, 0].numel()
    out = network.empty(gathers, buffers.slots[0]) if gathers else None
    if chains.counts[number] == 0:
        return out
    # an argument that this variant of the kernel does not read may be any tensor
    m_given, m_layout = with_inner_layout(memory if m is None else m, memory)
    out_given, out_layout = with_inner_layout(memory if out is None else out, memory)
    dense = elements, 0, 1
    branches = 1 if guidance is None else len(guidance)
    with torch.cuda.device_of(memory):  # Triton launches on the current device
        wave_update_kernel[(memory.shape[1], chains.counts[number], scratch.programs)](
            memory, m_given, memory if buffers.noises is None else buffers.noises,
            memory if guidance is None else guidance, out_given,
            chains.words, chains.numbers, chains.starts, chains.first, chains.measured,
            buffers.change, buffers.moved.view(torch.int8), scratch.partial, scratch.ticket,
            number, len(m_given) // branches, len(out_given) // network.branches, elements,
            memory.shape[1] * elements,
            m_given.stride(0), m_given.stride(1), *m_layout,
            out_given.stride(0), out_given.stride(1), *out_layout,
            HAS_M=m is not None, BRANCHES=branches, GUIDED=guidance is not None, CLIPS=table.clip is not None,
            LOOKS_BACK=table.looks_back, HAS_NOISE=table.draws > 0, RECORDS_MOVED=table.records_moved,
            GATHERS=out is not None, INPUTS=network.branches, M_DENSE=m_layout == dense,
            INPUT_DENSE=out_layout == dense, BLOCK=scratch.block, PARTS=triton.next_power_of_2(scratch.programs),
            num_warps=NUM_WARPS, maxnreg=REGISTERS[memory.dtype],
            # every variant must round alike: the SRDS program computes the sequential program's values to the bit
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _scratch(table: WaveTable, buffers: Buffers) -> Scratch:
    memory, elements = buffers.memory, buffers.memory[0, 0].numel()
    large = elements >= LARGE_STATE and memory.dtype == torch.float32  # float64 takes twice the registers
    block = LARGE_BLOCK if large else SMALL_BLOCK
    programs = min(MOST_PROGRAMS, triton.cdiv(elements, block))
    partial = memory.new_empty(max(1, *table.chains.measured_counts) * memory.shape[1] * programs)
    return Scratch(torch.zeros(1, dtype=torch.int32, device=memory.device), partial, block, programs)
