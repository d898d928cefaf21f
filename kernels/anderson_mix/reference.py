"""Triangular Anderson acceleration in plain PyTorch: the definition that the kernels must equal."""

from __future__ import annotations

import torch
from torch import Tensor


def anderson_mix(
    x: Tensor,
    residual: Tensor,
    dx: Tensor,
    dr: Tensor,
    *,
    regularisation: float,
    frontier: bool,
    out: Tensor | None = None,
) -> Tensor:
    """As srds_fast.kernels.anderson_mix.anderson_mix, without checks."""
    history = len(dr)
    both = torch.cat([dr, residual[None]]).double().flatten(3).permute(1, 2, 0, 3)  # [W, samples, H + 1, elements]
    products = (both[:, :, :history] @ both.transpose(2, 3)).cumsum(0)
    gram, projected = products[..., :history], products[..., history]
    gram = gram + regularisation * torch.eye(history, dtype=gram.dtype, device=gram.device)
    weights = _solved(gram, projected).movedim(-1, 0).to(x.dtype)  # [H, W, samples]
    correction = torch.zeros_like(x)
    for weight, state, difference in zip(weights, dx, dr, strict=True):
        correction = correction + weight.view(*weight.shape, *[1] * (x.dim() - 2)) * (state + difference)
    mixed = x + residual - correction
    if frontier:
        mixed[0] = x[0] + residual[0]
    return mixed if out is None else out.copy_(mixed)


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Positive definite systems [..., H, H] by elimination: a library's solver may refuse one that holds NaN."""
    rows = torch.cat([matrix, right.unsqueeze(-1)], -1)
    size = matrix.shape[-1]
    for k in range(size):
        pivot = rows[..., k : k + 1, :] / rows[..., k : k + 1, k : k + 1]
        others = torch.arange(size, device=rows.device).ne(k).unsqueeze(-1)
        rows = torch.where(others, rows - rows[..., k : k + 1] * pivot, pivot)
    return rows[..., size]
