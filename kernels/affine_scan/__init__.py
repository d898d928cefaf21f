"""Fixed-point sweep over a window of steps: affine steps with a correction that runs along the window.

One formula for ParaDiGMS (Picard) and ParaTAA (the exact linear part), which differ in the coefficient c alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from srds_fast.errors import InvalidArgument

from ..checks import (
    MOST_ELEMENTS,
    NETWORK_DTYPES,
    STATE_DTYPES,
    check_contiguous,
    check_device,
    check_dtype,
    check_shape,
)
from ..dispatch import implementation
from ..layout import inner_layout
from ..overlap import check_out, check_trailing
from ..tickets import Tickets, counts
from . import reference

__all__ = ["Coefficients", "Tickets", "affine_scan", "bytes_per_element", "coefficient_table"]


class Coefficients(NamedTuple):
    """Of one step: x' = a*y + b*m + e * clamp(p*y + q*m, -clip, clip) + s*z + c * (x - y)."""

    a: float
    b: float
    c: float
    s: float = 0.0
    e: float = 0.0
    p: float = 0.0
    q: float = 0.0


def coefficient_table(
    steps: Sequence[Coefficients], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """The steps' coefficients [window, 7], rounded once from float64, in the order of the fields of Coefficients."""
    return torch.tensor(steps, dtype=torch.float64).to(device, dtype)


def bytes_per_element(state: torch.dtype, network: torch.dtype, *, branches: int = 1, noise: bool = False) -> int:
    """Bytes moved per element and step, the fewest possible: read y, m and the noise once, write x once.

    The first step reads one point more: y_0, and `start` if it is given.
    """
    return (2 + noise) * state.itemsize + branches * network.itemsize


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
    tickets: Tickets | None = None,
) -> tuple[Tensor, Tensor]:
    """One sweep of a fixed-point iteration along a window of W steps, elementwise:

        x_{i+1} = a_i y_i + b_i m_i                                   the step from the old iterate y_i
                + e_i clamp(p_i y_i + q_i m_i, -clip, clip)           if clip is given: the clipped predicted sample
                + s_i z_i                                             if noise is given
                + c_i (x_i - y_i)                                     the correction, added last

    for i = 0..W-1, x_0 = start. c_i = 1 is Picard iteration (ParaDiGMS, Shih et al. 2023, algorithm 1: the prefix sum
    of the increments), c_i = a_i carries the linear part exactly (ParaTAA, Tang et al. 2024, the system of full order).
    Where x_i equals y_i bitwise, the correction is zero and x_{i+1} is the sequential sampler's step, bitwise. NaN
    spreads, the clamp included. The kernel's x is the reference's to the bit: no fused multiply-add.

    Bytes per element and step: bytes_per_element(), which is the fewest possible (float32 state, one float16 branch:
    10; with noise: 14). One launch; squared errors are summed in a fixed order, so two calls give the same bits.

    Args:
        y: [W + 1, samples, ...], float32 or float64, the old iterate; trailing dimensions contiguous. All arithmetic is
            in its dtype.
        m: [W, samples, ...], the network's output at y_0..y_{W-1}: float32, bfloat16, float16 or float64, converted as
            it is read. With guidance [branches, W, samples, ...]. The leading dimensions may have any strides; the
            trailing ones are contiguous or channels last.
        table: [W, 7], y's dtype, contiguous, from coefficient_table().
        start: [samples, ...], x_0, trailing dimensions contiguous; y_0 if None.
        noise: [W, samples, ...], z, y's dtype, trailing dimensions contiguous.
        clip: bound of the clamp; None leaves the whole term out.
        guidance: [branches], y's dtype, contiguous, 1 to 3 weights w: m is sum_g w_g m_g, added up in this order.
        out: [W, samples, ...], y's dtype, receives x; trailing dimensions contiguous. It may be y[1:] itself, and must
            not overlap any argument otherwise.
        tickets: counters for a call that is captured into a CUDA graph, see Tickets; None shares the stream's.

    Returns:
        x: [W, samples, ...], points 1..W of the new iterate (out, if given).
        squared_error: [W, samples], the sum over elements of (x_{i+1} - y_{i+1})^2, in y's dtype.

    Raises:
        InvalidArgument: an argument has the wrong shape, dtype, device, strides or range.
    """
    check_dtype("y", y, STATE_DTYPES)
    if y.dim() < 3 or len(y) < 2 or y.numel() == 0:
        raise InvalidArgument(
            f"y has shape {tuple(y.shape)}. It must be [W + 1, samples, ...], with at least one step, sample and "
            "trailing dimension. Pass such a tensor."
        )
    window, samples, *trailing = len(y) - 1, *y.shape[1:]
    elements = math.prod(trailing)
    if elements > MOST_ELEMENTS:
        raise InvalidArgument(f"y has {elements} elements a sample. The most is {MOST_ELEMENTS}. Split the samples.")
    check_trailing("y", y, 2)
    check_dtype("m", m, NETWORK_DTYPES)
    check_device("m", m, y.device)
    if guidance is None:
        check_shape("m", m, (window, samples, *trailing), "[W, samples, ...]")
    else:
        _check_state("guidance", guidance, y)
        if guidance.dim() != 1 or not 1 <= len(guidance) <= 3:
            raise InvalidArgument(
                f"guidance has shape {tuple(guidance.shape)}. It must be [branches], 1 to 3. Pass a weight per branch."
            )
        check_contiguous("guidance", guidance)
        check_shape("m", m, (len(guidance), window, samples, *trailing), "[branches, W, samples, ...]")
    layout = inner_layout("m", m if guidance is None else m[0], y)
    _check_state("table", table, y)
    check_shape("table", table, (window, len(Coefficients._fields)), "[W, 7]")
    check_contiguous("table", table)
    for name, tensor, shape, meaning in (
        ("start", start, (samples, *trailing), "[samples, ...]"),
        ("noise", noise, (window, samples, *trailing), "[W, samples, ...]"),
        ("out", out, (window, samples, *trailing), "[W, samples, ...]"),
    ):
        if tensor is not None:
            _check_state(name, tensor, y)
            check_shape(name, tensor, shape, meaning)
            check_trailing(name, tensor, tensor.dim() - len(trailing))
    if clip is not None and not 0 < clip < math.inf:
        raise InvalidArgument(f"clip is {clip}. It must be a positive number, or None. Pass such a number.")
    if out is not None:
        check_out(out, ("y[1:]", y[1:]), y=y, m=m, table=table, start=start, noise=noise, guidance=guidance)

    if implementation(y.device) == "torch":
        return reference.affine_scan(y, m, table, start=start, noise=noise, clip=clip, guidance=guidance, out=out)
    from . import kernel

    x = y.new_empty(window, samples, *trailing) if out is None else out
    squared_error = kernel.affine_scan(
        y,
        m,
        table,
        start=y[0] if start is None else start,
        noise=noise,
        clip=clip,
        guidance=guidance,
        out=x,
        layout=layout,
        counts=counts(y.device, samples, tickets),
    )
    return x, squared_error


def _check_state(name: str, tensor: Tensor, y: Tensor) -> None:
    check_dtype(name, tensor, (y.dtype,))
    check_device(name, tensor, y.device)
