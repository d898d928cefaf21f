"""The clamp of a predicted x0, in PyTorch; `arithmetic.clamped` is the same in Triton."""

from __future__ import annotations

from torch import Tensor


def clamped(x0: Tensor, clip: float | None) -> Tensor:
    """x0 between -clip and clip; unchanged without a clip.

    An infinite x0 becomes NaN: a finite bound in its place would hide from every later check that the network failed.
    """
    return x0 if clip is None else x0.clamp(-clip, clip) + (x0 - x0)
