"""Everything between two network calls of a fixed-point method that moves all points of the grid: two launches, and a
third where iterates are mixed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from srds_fast.errors import InvalidArgument

from ..checks import NETWORK_DTYPES, check_contiguous, check_device, check_dtype, check_shape
from ..dispatch import implementation
from ..wave_update import AS_THE_STATE, NetworkInput
from . import reference
from .memory import Memory, Refined
from .table import LOCAL, Sweep, Table, step_numbers, walk

__all__ = [
    "LOCAL",
    "Memory",
    "Refined",
    "Sweep",
    "Table",
    "bytes_per_element",
    "fixed_point_wave",
    "step_numbers",
    "walk",
]

Constrain = Callable[[Tensor, int], Tensor]


def bytes_per_element(state: torch.dtype, network: torch.dtype, history: int, *, branches: int = 1) -> int:
    """Bytes moved per element and point where all points are rows, of this wave and of the next.

    The sweep reads a state and its output, and writes the point and the output that is kept. Inner products read both
    states of a point and H residuals; the mixing H + 1 iterates, the point and H residuals, and writes the point, its
    residual and the network's input. Without history the point is only read once more.
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
    constrain: Constrain | None = None,
    watch: bool = False,
) -> Refined:
    """One sweep over the grid: from the network's output at its rows to its input at the next wave.

    At every point i from the first row on, with x the newest iterate and x' the one that it was made of:

        e_i  = m_i + response_i (x_i - x'_i)                  what is expected of the network, by what it said before
        m_i <- sum_g w_g m_g                                  at a row: what it says
               e_i + sum_k weight_ik (m_k - e_k)              between rows: corrected by the surprise at four of them
        f_i  = a_i x_i + b_i m_i + e_i clamp(p_i x_i + q_i m_i) + momentum_i (x0_i - x0_{i-1}) + spread_i z_i
        y_{i+1} = f_i + c_i (y_i - x_i)                       the sweep; from the first row on, where y is x

    and then triangular Anderson acceleration of y over H differences to earlier iterates, see `anderson_mix`. The
    network's input is made of the new points, scaled, cast and repeated per branch. Where y_i equals x_i bitwise,
    y_{i+1} is the sequential sampler's step, bitwise; the first point that moves is not mixed. NaN stays in its sample.

    On CUDA these are two launches: the sweep, in which a program owns some elements of one sample and goes from point
    to point, and all that follows, point by point. Where iterates are mixed a third one between them takes the inner
    products: those of all points at once, which in the sweep would wait for each other. A correction that reaches along
    some steps only (`PreparedScan.order`) is no kernel's and runs the reference everywhere. Sums are taken in a fixed
    order: two calls give the same bits. Nothing is taken from the host.

    Args:
        table: of the grid.
        number: of the sweep's last wave.
        memory: of the run, written in place.
        m: network output at the rows, [branches * rows, samples, ...], float32, bfloat16, float16 or float64; its
            states contiguous or channels last.
        guidance: [branches], of the state's dtype, 1 to 3 weights w; None: one branch, as it is.
        network: how the next input is wanted.
        constrain: ([points, samples, ...], position of the first) -> the same with what holds for every state.
        watch: fill `Refined.still`.

    Raises:
        InvalidArgument: an argument does not fit the table or the memory; it is named.
    """
    wave = table.sweeps[number]
    _check(wave, memory.m, m, guidance)
    if not table.fused or implementation(m.device) == "torch":
        reference.sweep(table, wave, memory, m, guidance)
        _constrain(constrain, wave, memory)
        return reference.mix(table, wave, memory, network, watch)
    from . import kernel

    kernel.sweep(table, wave, memory, m, guidance)
    _constrain(constrain, wave, memory)
    return kernel.mix(table, wave, memory, network, watch)


def _constrain(constrain: Constrain | None, wave: Sweep, memory: Memory) -> None:
    if constrain is not None:
        points = memory.after[wave.first + 1 :]
        points.copy_(constrain(points, wave.first + 1))


def _check(wave: Sweep, outputs: Tensor, m: Tensor, guidance: Tensor | None) -> None:
    branches = 1
    if guidance is not None:
        check_dtype("guidance", guidance, (outputs.dtype,))
        check_device("guidance", guidance, outputs.device)
        if guidance.dim() != 1 or not 1 <= len(guidance) <= 3:
            raise InvalidArgument(
                f"guidance has shape {tuple(guidance.shape)}. It must be [branches], 1 to 3. Pass a weight per branch."
            )
        check_contiguous("guidance", guidance)
        branches = len(guidance)
    check_dtype("m", m, NETWORK_DTYPES)
    check_device("m", m, outputs.device)
    check_shape("m", m, (branches * len(wave.positions), *outputs.shape[1:]), "[branches * rows, samples, ...]")
