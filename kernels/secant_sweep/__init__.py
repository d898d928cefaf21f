"""One secant sweep of collocation, from the network's output at some points to its next input: two launches."""

from __future__ import annotations

from torch import Tensor

from ..common.checks import NETWORK_DTYPES, check_guidance, check_tensor
from ..common.clamping import Threshold
from ..common.dispatch import implementation
from ..common.network_input import AS_THE_STATE, NetworkInput
from . import reference
from .memory import Memory, SweepResult
from .reference import ConstrainOne, predict_x0
from .sizes import bytes_per_element, launches
from .table import LOCAL, Around, Interpolation, SecantTable, SecantWave, around, step_numbers

__all__ = [
    "LOCAL",
    "Around",
    "Interpolation",
    "Memory",
    "SecantTable",
    "SecantWave",
    "SweepResult",
    "around",
    "bytes_per_element",
    "launches",
    "predict_x0",
    "secant_sweep",
    "step_numbers",
]


def secant_sweep(
    table: SecantTable,
    number: int,
    memory: Memory,
    m: Tensor,
    *,
    guidance: Tensor | None = None,
    network: NetworkInput = AS_THE_STATE,
    constrain: ConstrainOne | None = None,
    check_stationary: bool = False,
) -> SweepResult:
    """One sweep over the grid: from the network's output at its rows to the network's input at the next wave.

    At every point i from the first row on, with E_i the output of the last sweep and what it was expected to change by:

        m_i <- sum_g w_g m_g                                    at a row: the network's output
               E_i + sum_k weight_ik (m_k - E_k)                between rows: with the surprises of four nodes
        d_{i+1} = f_i(x_i, m_i) - x_{i+1} + a_i d_i + b_i dm_i + e_i 1[|x0_i| <= clip] (p_i d_i + q_i dm_i)
        dm_i    = r_i d_i + U_i (S_i' S_i + ridge_i I)^-1 S_i' d_i

    where S_i are H movements of the point, U_i what its outputs changed by beyond r_i S_i, and f_i the scheduler's step
    with its momentum and noise; see `reference`. Every point moves by d_i. Where a point does not move, the next one is
    the sequential sampler's step from it, bitwise. NaN stays in its sample.

    On CUDA the sweep is two launches. In the first a program owns a point of a sample: it updates the output, and sums
    what the point has learnt over the elements. In the second a program owns a sample, and goes from point to point
    with its change in registers. It moves 4 H + 7 states an element and point, 64 bytes with the row in and out at two
    differences (`bytes_per_element`). Of samples that one program cannot hold (`sizes.sharing`) each step is a launch,
    and three more. Where a constraint is given, or steps look back
    further than at one x0, the reference runs. Sums are taken in a fixed order that the size of a
    sample alone decides, so a sample has the same bits in every call and in every batch. No launch needs a value from
    the host.

    Args:
        number: of the sweep's last wave.
        m: network output at the rows, [branches * rows, samples, ...], float32, bfloat16, float16 or float64.
        guidance: [branches], in the state's dtype, the weights w; None: one branch, weight 1.
        constrain: maps the states that arrive at a position to states that meet the constraint.
        check_stationary: fill `SweepResult.stationary`.

    Raises:
        InvalidArgument: for an argument that does not fit the table or the memory.
    """
    wave = table.waves[number]
    branches = check_guidance(guidance, memory.expected)
    shape = (branches * len(wave.positions), memory.expected.shape[1], *memory.shape)
    check_tensor("m", m, NETWORK_DTYPES, memory.expected.device, shape, "[branches * rows, samples, ...]")
    how = guidance, network
    alone = constrain is None and table.look_back is None and not isinstance(table.clip, Threshold)
    if not alone or implementation(m.device) == "torch":
        return reference.secant_sweep(table, number, memory, m, *how, constrain, check_stationary)
    from . import walk_kernel

    return walk_kernel.secant_sweep(table, number, memory, m, *how, check_stationary)
