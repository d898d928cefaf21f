"""Everything between two network calls, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from srds_fast.errors import InvalidArgument

from ..checks import NETWORK_DTYPES, check_contiguous, check_device, check_dtype, check_shape
from ..overlap import check_apart
from . import counted, reference
from .buffers import AS_THE_STATE, Buffers, NetworkInput
from .table import WaveTable
from .update import Entering, Made, Summed, Update

__all__ = [
    "AS_THE_STATE",
    "Buffers",
    "Entering",
    "Made",
    "NetworkInput",
    "Summed",
    "Update",
    "WaveTable",
    "wave_update",
]


def wave_update(
    table: WaveTable,
    number: int | Tensor,
    buffers: Buffers,
    m: Tensor | None = None,
    *,
    guidance: Tensor | None = None,
    network: NetworkInput = AS_THE_STATE,
    out: Tensor | None = None,
) -> Tensor | None:
    """Run one update of a table: from the network's output at one wave to its input at the next.

    Guidance, conversion of the prediction, clamp of x0, fine steps and coarse jumps, the Parareal correction
    F + (G_new - G_old) in that order, the change of the last boundary, and the rows of the next call, scaled, cast and
    repeated per branch; see `update` for the formulas. On CUDA this is one launch of a Triton kernel. It takes nothing
    from the host but a number, and with a counter on the device not even that.

    Bytes per element of a state: a steady wave of R rows (float32 state, network dtype of e bytes, g branches) reads R
    states and their outputs and writes R values and their next inputs, 2 R (4 + e g): 24 R in half precision under
    guidance. Corrections read two jumps each, and the last boundary its value an iteration before. This is the fewest
    possible, and what comes from and goes to memory; a row that makes several values, a jump, a fine step and an x0, is
    read for each of them, again from the cache: a fifth on top over a whole run. `traffic` counts both.

    Args:
        table: the updates.
        number: which one: an int, or an int32 tensor [1] on the device, which the launch counts up. That is for
            replays: `out` then has room for the widest update, m for those it is called for; narrower ones take the
            first rows of each branch, and beyond the last update nothing is done. A first call before a capture makes
            what a launch needs.
        buffers: memory of the run, written in place.
        m: network output, [branches * rows, samples, ...], float32, bfloat16, float16 or float64; its states contiguous
            or channels last, e.g. the first C of 2C channels. None where the update makes nothing.
        guidance: [branches], of the memory's dtype, weights of the branches in m's sum; None: one branch, as it is.
        network: how the next input is wanted.
        out: [branches * rows, samples, ...], where to write it.

    Returns:
        the next network input, [branches * rows, samples, ...]; None if nothing enters.

    Raises:
        InvalidArgument: an argument does not fit the table or the buffers; it is named.
    """
    _check(table, number, buffers, m, guidance, network, out)
    if buffers.implementation == "torch":
        if isinstance(number, Tensor):
            return counted.wave_update(table, number, buffers, m, guidance, network, out)
        return reference.wave_update(table, number, buffers, m, guidance, network, out)
    from . import kernel

    return kernel.wave_update(table, number, buffers, m, guidance, network, out)


def _check(
    table: WaveTable,
    number: int | Tensor,
    buffers: Buffers,
    m: Tensor | None,
    guidance: Tensor | None,
    network: NetworkInput,
    out: Tensor | None,
) -> None:
    if buffers.table is not table:
        raise InvalidArgument("buffers were made for another table. Slots differ. Make them from this one.")
    memory, state = buffers.memory, buffers.slots[0].shape
    branches = 1
    if guidance is not None:
        check_shape("guidance", guidance, (len(guidance),), "[branches]")
        check_dtype("guidance", guidance, (memory.dtype,))
        check_device("guidance", guidance, memory.device)
        check_contiguous("guidance", guidance)
        branches = len(guidance)
    if isinstance(number, Tensor):
        check_shape("number", number, (1,), "[1]")
        check_dtype("number", number, (torch.int32,))
        check_device("number", number, memory.device)
        if out is None and table.most_entering:
            raise InvalidArgument(
                "out is None. With a counter on the device the host does not know how many rows enter. Pass out."
            )
        most_entering = table.most_entering * network.branches
        # wider than the update is room that nothing is read from or written to
        rows = table.most_rows * branches if m is None or len(m) % branches or not len(m) else len(m)
        entering = most_entering if out is None or len(out) < most_entering or len(out) % network.branches else len(out)
    elif not 0 <= number < len(table.updates):
        raise InvalidArgument(f"number is {number}. The table has {len(table.updates)} updates. Pass one of them.")
    else:
        rows, entering = table.num_rows[number] * branches, len(table.updates[number].entering) * network.branches
    if m is not None:
        check_dtype("m", m, NETWORK_DTYPES)
        check_device("m", m, memory.device)
        # an update that makes nothing does not look at m
        check_shape("m", m, (rows or len(m), *state), "[branches * rows, samples, ...]")
    elif rows:
        raise InvalidArgument(f"m is None. Update {number} makes values from {rows} rows. Pass the network's output.")
    if out is not None:
        check_dtype("out", out, (network.dtype or memory.dtype,))
        check_device("out", out, memory.device)
        check_shape("out", out, (entering, *state), "[branches * rows, samples, ...]")
        check_apart("out", out, m=m, memory=memory)
