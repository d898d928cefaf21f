"""What is done to a predicted x0, in PyTorch; `arithmetic.clamped` is the clamp in Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Threshold(NamedTuple):
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): each x0 is clamped to -s .. s and divided by s.

    s is this quantile of the absolute values of the x0, but at least 1 and at most `most`.
    """

    quantile: float
    most: float

    def of(self, x0: Tensor, leading: int) -> Tensor:
        """s of each x0, as a column over its elements. leading: dimensions before those of an x0."""
        sizes = x0.abs().flatten(leading)
        s = torch.quantile(sizes, self.quantile, dim=-1).clamp(min=1, max=self.most)
        return s.reshape(*s.shape, *[1] * (x0.ndim - leading))


Clip = float | Threshold
"""What bounds x0: it is clamped to +-clip, or thresholded."""


def clamped(x0: Tensor, clip: Clip | None, leading: int = 2) -> Tensor:
    """x0 between -clip and clip, or thresholded; unchanged without a clip. leading: dimensions before those of an x0.

    An infinite x0 becomes NaN: a finite bound in its place would hide from every later check that the network failed.
    """
    if clip is None:
        return x0
    if isinstance(clip, Threshold):
        s = clip.of(x0, leading)
        return x0.clamp(-s, s) / s + (x0 - x0)
    return x0.clamp(-clip, clip) + (x0 - x0)


def clamp_slope(x0: Tensor, clip: Clip) -> Tensor:
    """How `clamped` of [points, samples, ...] answers to a small change of each element, as if that changed no s."""
    if isinstance(clip, Threshold):
        s = clip.of(x0, 2)
        return (x0.abs() <= s).to(x0.dtype) / s
    return (x0.abs() <= clip).to(x0.dtype)


def range_of(clip: Clip) -> float:
    """The largest absolute value of a clamped x0."""
    return 1.0 if isinstance(clip, Threshold) else clip
