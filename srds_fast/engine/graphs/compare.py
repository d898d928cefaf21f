"""A replay is compared with the eager run that was recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import CaptureFailed
from ...solvers.contract import Core, Evaluate
from .capturable import Capturable
from .recording import LoopGraph
from .replay import Replay

# Largest difference between a replay and the eager run, relative to the largest value. A wrong recording is wrong by
# far more; batches of other widths round differently.
SAME = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def compare(captured: LoopGraph, call: Capturable, expected: Tensor, iterations: list[int]) -> None:
    """Raise CaptureFailed if a replay on the call's own inputs does not give its result.

    Args:
        expected: result of the eager run, [batch, ...].
        iterations: after how many each sample was done.
    """
    core = Replay(captured, call.inputs).core
    try:
        found = _result(core, expected, iterations)
    finally:
        core.close()
    refuse_difference(found, expected, call.dtype)


def refuse_difference(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise CaptureFailed if what a replay found is not what an eager run in this dtype gave."""
    if not expected.numel():
        return
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= SAME.get(dtype, 0.0) * largest:
        raise CaptureFailed(
            f"The loop is not captured: its replay differs from the eager run by {difference:.2g} where values reach "
            f"{largest:.2g}. Something in the network is not repeated by a replay. It runs eagerly."
        )


def _result(core: Core, expected: Tensor, iterations: list[int]) -> Tensor:
    """What a replay gives if each sample is done after its number of iterations."""
    found = torch.empty_like(expected)
    event: Any = next(core)
    try:
        while True:
            if isinstance(event, Evaluate):
                event = core.send(event.x)
                continue
            done = [position for position, sample in enumerate(event.samples) if iterations[sample] <= event.iteration]
            ids = [event.samples[position] for position in done]
            found[ids] = event.sample[done]
            event = core.send(tuple(position for position in range(len(event.samples)) if position not in done))
    except StopIteration:
        return found
