"""Triangular Anderson acceleration in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def anderson_mix(x: Tensor, residual: Tensor, dx: Tensor, dr: Tensor, regularisation: float) -> Tensor:
    """The accelerated iterate of a window of W points (ParaTAA, Tang et al. 2024, triangular Anderson acceleration).

    For each sample and each point i, with R = F(x) - x:

        A_i = sum_{j <= i} <dr_j^a, dr_j^b>        b_i = sum_{j <= i} <dr_j^a, R_j>        [H, H] and [H]
        (A_i + lambda I) g_i = b_i
        x_i + R_i - sum_a g_i^a (dx_i^a + dr_i^a)

    Points run from the noisiest (0) to the cleanest (W - 1). The paper counts time downwards: its suffix sums over
    noisier points are prefix sums here. Point i reads nothing of later points, so the points still become exact one by
    one. Point 0 takes the plain update x_0 + R_0; its dr and R count in the sums of later points.

    Products, sums and the solution are in float64. In float32 their rounding errors outgrow lambda as soon as two
    differences are nearly parallel, and pivots may become negative. NaN stays in its sample.

    x and residual, R: [W, samples, ...]; dx and dr: [H, W, samples, ...], H >= 1 differences of iterates, and of the
    residuals that belong to them; regularisation: lambda > 0.
    """
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
    mixed[0] = x[0] + residual[0]
    return mixed


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve positive definite systems [..., H, H] by elimination: a library's solver may refuse NaN."""
    rows = torch.cat([matrix, right.unsqueeze(-1)], -1)
    size = matrix.shape[-1]
    for k in range(size):
        pivot = rows[..., k : k + 1, :] / rows[..., k : k + 1, k : k + 1]
        others = torch.arange(size, device=rows.device).ne(k).unsqueeze(-1)
        rows = torch.where(others, rows - rows[..., k : k + 1] * pivot, pivot)
    return rows[..., size]
