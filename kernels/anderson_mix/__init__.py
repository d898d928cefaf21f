"""Triangular Anderson acceleration of a fixed-point sweep over a window of steps (ParaTAA)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srds_fast.errors import InvalidArgument

from ..checks import STATE_DTYPES, check_device, check_dtype, check_shape
from ..dispatch import implementation
from ..overlap import check_out, check_trailing
from ..tickets import Tickets, counts
from . import reference

__all__ = ["MOST_HISTORY", "Tickets", "anderson_mix", "bytes_per_element"]

MOST_HISTORY = 5


def bytes_per_element(state: torch.dtype, history: int) -> tuple[int, int]:
    """Bytes moved per element by the two launches: inner products (dr and R), update (x, R, dx, dr and the result).

    In all 3 H + 4 numbers. The fewest possible are 2 H + 3, each tensor touched once: R and dr are read twice, since
    no element can be updated before all of its sample are summed. The frontier position skips dx and dr in the update.
    """
    return (history + 1) * state.itemsize, (2 * history + 3) * state.itemsize


def anderson_mix(
    x: Tensor,
    residual: Tensor,
    dx: Tensor,
    dr: Tensor,
    *,
    regularisation: float = 1e-3,
    frontier: bool = True,
    out: Tensor | None = None,
    tickets: Tickets | None = None,
) -> Tensor:
    """The accelerated iterate of a window of W points, for each sample and position i (ParaTAA, Tang et al. 2024,
    "triangular Anderson acceleration"):

        A_i = sum_{j <= i} <dr_j^a, dr_j^b>        b_i = sum_{j <= i} <dr_j^a, R_j>        [H, H] and [H]
        (A_i + lambda I) g_i = b_i
        x_i + R_i - sum_a g_i^a (dx_i^a + dr_i^a)

    R = F(x) - x. Positions run from the noisiest (0) to the cleanest (W - 1): the paper counts time downwards, its
    suffix sums over noisier points are prefix sums here. Position i reads nothing of positions after it, so that the
    sequential sampler's points still become exact one by one. The frontier, position 0, takes the plain update
    x_0 + R_0, which is exact if the point before it is; its dr and R count in the sums of the positions after it.

    Inner products, sums and the solution are in float64: in float32 their rounding outgrows lambda as soon as two
    differences are nearly parallel and the pivots may turn negative. The update is in x's dtype, without fused
    multiply-add: a history of zeros gives x + R to the bit. NaN spreads to its own sample, from its position on.

    Bytes per element: bytes_per_element(). Two launches, no matter how many samples and positions. Sums are taken in a
    fixed order: two calls give the same bits.

    Args:
        x: [W, samples, ...], float32 or float64, the iterate. Of this and all other tensors, trailing dimensions are
            contiguous.
        residual: [W, samples, ...], R, x's dtype.
        dx: [H, W, samples, ...], x's dtype, differences of iterates, 1 <= H <= 5, in any order.
        dr: [H, W, samples, ...], x's dtype, the differences of residuals that belong to them.
        regularisation: lambda > 0, absolute.
        frontier: whether position 0 takes the plain update.
        out: [W, samples, ...], x's dtype, receives the result. It may be x itself, and must not overlap any argument
            otherwise.
        tickets: counters for a call that is captured into a CUDA graph, see Tickets; None shares the stream's.

    Returns:
        The new iterate [W, samples, ...] (out, if given).

    Raises:
        InvalidArgument: an argument has the wrong shape, dtype, device, strides or range.
    """
    check_dtype("x", x, STATE_DTYPES)
    if x.dim() < 3 or x.numel() == 0:
        raise InvalidArgument(
            f"x has shape {tuple(x.shape)}. It must be [W, samples, ...], with at least one step, sample and trailing "
            "dimension. Pass such a tensor."
        )
    if dr.dim() == 0 or not 1 <= len(dr) <= MOST_HISTORY:
        raise InvalidArgument(
            f"dr has shape {tuple(dr.shape)}. It must be [H, W, samples, ...], with H from 1 to {MOST_HISTORY}. "
            "Pass fewer differences."
        )
    for name, tensor in (("residual", residual), ("dr", dr), ("dx", dx), ("out", out)):
        if tensor is not None:
            history = (len(dr),) if name in ("dx", "dr") else ()
            check_dtype(name, tensor, (x.dtype,))
            check_device(name, tensor, x.device)
            check_shape(name, tensor, (*history, *x.shape), "[H, W, samples, ...]" if history else "[W, samples, ...]")
            check_trailing(name, tensor, len(history) + 2)
    check_trailing("x", x, 2)
    if not 0 < regularisation < math.inf:
        raise InvalidArgument(f"regularisation is {regularisation}. It must be positive and finite. Pass 1e-3.")
    if out is not None:
        check_out(out, ("x", x), x=x, residual=residual, dx=dx, dr=dr)

    if implementation(x.device) == "torch":
        return reference.anderson_mix(x, residual, dx, dr, regularisation=regularisation, frontier=frontier, out=out)
    from . import kernel

    mixed = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    kernel.anderson_mix(
        x,
        residual,
        dx,
        dr,
        regularisation=regularisation,
        frontier=frontier,
        out=mixed,
        counts=counts(x.device, x.shape[1], tickets),
    )
    return mixed
