"""How far two outputs of a network are apart, in units of the rounding that another batch size brings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .rule import is_list, same

# the relative difference of two calls with the same rows, by dtype of the output
ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def distance(found: Any, expected: Any) -> float:
    """The largest relative difference of an entry, in units of rounding; infinite if the two cannot be compared."""
    if is_list(expected):
        if len(found) != len(expected):
            return math.inf
        return max(map(distance, found, expected))
    if not isinstance(expected, Tensor):
        return 0.0 if same(found, expected) else math.inf
    if found.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else math.inf
    expected_rows = expected.detach().reshape(len(expected) if expected.ndim > 1 else 1, -1).double()
    off = (found.detach().reshape(expected_rows.shape).double() - expected_rows).norm(dim=1)
    size = expected_rows.norm(dim=1)
    share = float((off / size.clamp(min=1e-30 + 1e-3 * float(size.max()))).max()) if off.numel() else 0.0
    return share / ROUNDING.get(expected.dtype, 1e-5) if math.isfinite(share) else math.inf
