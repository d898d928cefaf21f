"""One wave of a fixed-point method that moves all points of the grid: two launches, three if iterates are mixed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.checks import NETWORK_DTYPES, check_guidance, check_tensor
from ..common.dispatch import implementation
from ..common.network_input import AS_THE_STATE, NetworkInput
from . import reference
from .memory import Memory, SweepResult
from .scan import Scan, ScanStep
from .table import Sweep, Table, step_numbers

__all__ = [
    "Memory",
    "Scan",
    "ScanStep",
    "Sweep",
    "SweepResult",
    "Table",
    "bytes_per_element",
    "fixed_point_wave",
    "step_numbers",
]


def bytes_per_element(state: torch.dtype, network: torch.dtype, history: int, *, branches: int = 1) -> int:
    """Bytes that a wave moves per element and point, if all points are rows of this wave and of the next.

    The sweep reads and writes a point and its output. The inner products read a point before and after the sweep and H
    residuals. The mixing reads H + 1 iterates, the point and H residuals, and writes the point, its residual and the
    network's input. Without history the point is only read once more.
    """
    mixing = 2 if history == 0 else (history + 2) + (2 * history + 2) + 2
    return (3 + mixing) * state.itemsize + 2 * branches * network.itemsize


def fixed_point_wave(
    table: Table,
    number: int,
    memory: Memory,
    m: Tensor,
    *,
    guidance: Tensor | None = None,
    network: NetworkInput = AS_THE_STATE,
    constrain: Callable[[Tensor, int], Tensor] | None = None,
    check_stationary: bool = False,
) -> SweepResult:
    """One sweep over the grid: from the network's output at its rows to the network's input at the next wave.

    At every point i from the first row on, with x the newest iterate:

        m_i  = sum_g w_g m_g                                  the network's output
        f_i  = a_i x_i + b_i m_i + e_i clamp(p_i x_i + q_i m_i) + momentum_i (x0_i - x0_{i-1}) + spread_i z_i
        y_{i+1} = f_i + c_i (y_i - x_i)                       the sweep, from the first row on, where y = x

    Then triangular Anderson acceleration mixes y over H differences, see `anderson.anderson_mix`, and the new points
    become the network's input: scaled, cast and repeated per branch. Where y_i equals x_i bitwise, y_{i+1} is the
    sequential sampler's step, bitwise. The first point that moves is not mixed. NaN stays in its sample.

    On CUDA the sweep is one launch, in which a program owns some elements of one sample and goes from point to point.
    Everything after it is a second launch, point by point; with history, one more launch between them takes the inner
    products of all points at once. Steps whose correction reaches only some points, or that look back further than at
    one x0, run the reference everywhere (`Table.fused`). Sums are taken in a fixed order, so two calls give the same
    bits. No launch needs a value from the host.

    number: of the sweep's last wave. m: network output at the rows, [branches * rows, samples, ...], float32, bfloat16,
    float16 or float64. guidance: [branches], in the state's dtype, the weights w; None: one branch, weight 1.
    constrain: maps (points [points, samples, ...], position of the first) to points that meet the constraint.
    Raises InvalidArgument for an argument that does not fit the table or the memory.
    """
    wave = table.sweeps[number]
    branches = check_guidance(guidance, memory.m)
    shape = (branches * len(wave.positions), *memory.m.shape[1:])
    check_tensor("m", m, NETWORK_DTYPES, memory.m.device, shape, "[branches * rows, samples, ...]")
    if not table.fused or implementation(m.device) == "torch":
        sweep, mix = reference.sweep, reference.mix
    else:
        from .mix_kernel import mix
        from .sweep_kernel import sweep

    sweep(table, wave, memory, m, guidance)
    if constrain is not None:
        points = memory.after[wave.first + 1 :]
        points.copy_(constrain(points, wave.first + 1))
    return mix(table, wave, memory, network, check_stationary)
