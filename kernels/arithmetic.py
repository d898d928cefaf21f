"""What the kernels share: rounding to a narrower dtype."""

import triton
import triton.language as tl


@triton.jit
def rounded(value, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    """`value` in a dtype, rounded to nearest even.

    BY_HAND rounds float32 to bfloat16 by its bits: Triton's interpreter truncates, GPUs round.
    """
    if BY_HAND and dtype == tl.bfloat16:
        narrow = value.to(tl.float32)
        bits = narrow.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(narrow == narrow, bits.to(tl.float32, bitcast=True), narrow)
    return value.to(dtype)
