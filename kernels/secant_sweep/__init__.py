"""One secant sweep of collocation, from the network's output at some points to its next input: two launches."""

from __future__ import annotations

from torch import Tensor

from ..common.checks import NETWORK_DTYPES, check_guidance, check_tensor
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
    caution: float = 1.0,
    constrain: ConstrainOne | None = None,
    check_stationary: bool = False,
) -> SweepResult:
    """docstring"""
    wave = table.waves[number]
    branches = check_guidance(guidance, memory.expected)
    shape = (branches * len(wave.positions), memory.expected.shape[1], *memory.shape)
    check_tensor("m", m, NETWORK_DTYPES, memory.expected.device, shape, "[branches * rows, samples, ...]")
    how = guidance, network, caution
    if constrain is not None or implementation(m.device) == "torch":
        return reference.secant_sweep(table, number, memory, m, *how, constrain, check_stationary)
    from . import walk_kernel

    return walk_kernel.secant_sweep(table, number, memory, m, *how, check_stationary)
