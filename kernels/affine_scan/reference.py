"""The scan in plain PyTorch: the definition that the kernel must equal."""

from __future__ import annotations

import torch
from torch import Tensor


def affine_scan(
    y: Tensor,
    m: Tensor,
    table: Tensor,
    *,
    start: Tensor | None = None,
    noise: Tensor | None = None,
    clip: float | None = None,
    guidance: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As srds_fast.kernels.affine_scan.affine_scan, without checks."""
    m = m.to(y.dtype)
    if guidance is not None:
        outputs = m
        m = guidance[0] * outputs[0]
        for weight, output in zip(guidance[1:], outputs[1:], strict=True):
            m = m + weight * output
    x = y[0] if start is None else start
    points, squared_errors = [], []
    for i, (a, b, c, s, e, p, q) in enumerate(table):
        f = a * y[i] + b * m[i]
        if clip is not None:
            f = f + e * torch.clamp(p * y[i] + q * m[i], -clip, clip)
        if noise is not None:
            f = f + s * noise[i]
        x = f + c * (x - y[i])
        points.append(x)
        squared_errors.append((x - y[i + 1]).square().flatten(1).sum(1))
    return torch.stack(points, out=out), torch.stack(squared_errors)
