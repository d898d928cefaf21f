"""Arithmetic that several kernels use."""

import triton
import triton.language as tl

from .dispatch import interpreted

_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """`value` in a dtype, rounded to nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:  # Triton's interpreter truncates here: round on the bits
        narrow = value.to(tl.float32)
        bits = narrow.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(narrow == narrow, bits.to(tl.float32, bitcast=True), narrow)
    return value.to(dtype)


@triton.jit
def clamped(value, bound):
    """`value` between -bound and bound. NaN stays NaN, as comparisons with it are false; infinity becomes NaN."""
    return tl.where(value > bound, bound, tl.where(value < -bound, -bound, value)) + (value - value)


@triton.jit
def offsets(element, inner, outer_stride, inner_stride, DENSE: tl.constexpr):
    """Where elements lie in memory, see `layout.Inner`; DENSE: in order, without gaps. `element` is an index."""
    if DENSE:
        found = element.to(tl.int64)
    else:
        found = (element // inner).to(tl.int64) * outer_stride + (element % inner).to(tl.int64) * inner_stride
    return found


@triton.jit
def ring_slot(ring, number, SLOTS: tl.constexpr, slot_stride):
    """The slot of a ring buffer that holds entry `number`."""
    return ring + (number % SLOTS).to(tl.int64) * slot_stride


@triton.jit
def combined(m, branch_stride, guidance, mask, BRANCHES: tl.constexpr, GUIDED: tl.constexpr, dtype: tl.constexpr):
    """The weighted sum of the guidance branches, see `network_input.guided`."""
    first = tl.load(m, mask, 0).to(dtype)
    output = first
    if GUIDED:
        output = total(guidance, BRANCHES) * first
        for branch in tl.static_range(1, BRANCHES):
            offset = tl.full([], branch, tl.int64) * branch_stride
            output += tl.load(guidance + branch) * (tl.load(m + offset, mask, 0).to(dtype) - first)
    return output


@triton.jit
def total(guidance, BRANCHES: tl.constexpr):
    """The sum of the weights of the guidance branches."""
    found = tl.load(guidance)
    for branch in tl.static_range(1, BRANCHES):
        found += tl.load(guidance + branch)
    return found
