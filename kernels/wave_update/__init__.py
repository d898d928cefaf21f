"""Everything between two network calls of a program of steps and jumps, in one launch."""

from __future__ import annotations

from torch import Tensor

from srds_fast.errors import InvalidArgument
from srds_fast.words import counted

from ..common.checks import NETWORK_DTYPES, check_guidance, check_tensor
from ..common.network_input import AS_THE_STATE, NetworkInput
from . import reference
from .buffers import Buffers
from .table import WaveTable
from .update import Correction, Gather, Step, Update

__all__ = [
    "AS_THE_STATE",
    "Buffers",
    "Correction",
    "Gather",
    "NetworkInput",
    "Step",
    "Update",
    "WaveTable",
    "wave_update",
]


def wave_update(
    table: WaveTable,
    number: int,
    buffers: Buffers,
    m: Tensor | None = None,
    *,
    guidance: Tensor | None = None,
    network: NetworkInput = AS_THE_STATE,
) -> Tensor | None:
    """Run one update of a table: from the network's output at one wave to its input at the next.

    `update` has the formulas: guidance, the conversion of the prediction, the clamp of x0, fine steps and coarse jumps,
    the Parareal correction, and the rows of the next call, scaled, cast and repeated per branch. On CUDA this is one
    launch of a Triton kernel. It takes only a number from the host.

    A steady wave of R rows (float32 state, network dtype of e bytes, g branches) reads R states and their outputs, and
    writes R values and their next inputs: 2 R (4 + e g) bytes per element of a state, the fewest possible. A row that
    several steps read is read again from the cache, which adds a fifth over a whole run. `traffic` counts both.

    Call one before a capture: the first call allocates what a launch needs. m: network output, [branches * rows,
    samples, ...], float32, bfloat16, float16 or float64, copied if it is neither contiguous nor channels last; None for
    an update without steps. guidance: [branches], in the memory's dtype, weights of the branches in m's sum; None: one
    branch, weight 1. Returns the next network input, [branches * rows, samples, ...]; None for an update without
    gathers. Raises InvalidArgument for an argument that does not fit the table or the buffers.
    """
    if buffers.table is not table:
        raise InvalidArgument("buffers were made for another table. Slots differ. Make them from this one.")
    branches = check_guidance(guidance, buffers.memory)
    if not 0 <= number < len(table.updates):
        raise InvalidArgument(
            f"number is {number}. The table has {counted(len(table.updates), 'update')}. Pass one of them."
        )
    rows = table.num_rows[number] * branches
    if m is not None:
        # an update without steps ignores m
        shape = (rows or len(m), *buffers.slots[0].shape)
        check_tensor("m", m, NETWORK_DTYPES, buffers.memory.device, shape, "[branches * rows, samples, ...]")
    elif rows:
        raise InvalidArgument(
            f"m is None. Update {number} makes values from {counted(rows, 'row')}. Pass the network's output."
        )
    if buffers.implementation == "torch":
        return reference.wave_update(table, number, buffers, m, guidance, network)
    from . import kernel

    return kernel.wave_update(table, number, buffers, m, guidance, network)
