"""What tests of several files share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor


def randomly(*shape: int, seed: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def scan_by_definition(y: Tensor, m: Tensor, table: Tensor, added: Tensor | None, clip: float | None) -> Tensor:
    """The steps of `Scan`, one after another; table: [W, 6], of the window."""
    x, points = y[0], []
    for i, (a, b, c, e, p, q) in enumerate(table):
        f = a * y[i] + b * m[i]
        if clip is not None:
            f = f + e * torch.clamp(p * y[i] + q * m[i], -clip, clip)
        if added is not None:
            f = f + added[i]
        x = f + c * (x - y[i])
        points.append(x)
    return torch.stack(points)


def thinned(product: Sequence[tuple[Any, ...]], *kept: tuple[Any, ...]) -> list[Any]:
    """A product of cases, of which all but a few are left to `pytest -m exhaustive`."""
    assert set(kept) <= set(product)
    return [case if case in kept else pytest.param(*case, marks=pytest.mark.exhaustive) for case in product]
