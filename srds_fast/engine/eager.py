"""The eager engine: one network call a wave, in a Python loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..solvers.contract import Evaluate


@torch.no_grad()
def drain(next_wave: Callable[[Tensor | None], Evaluate | None], evaluate: Callable[[Evaluate], Tensor]) -> None:
    """Run waves until there are none left.

    Args:
        next_wave: given the output of the last wave (None at first), returns the next one, or None at the end.
        evaluate: runs the network on a wave, returns [rows, samples, ...].
    """
    wave = next_wave(None)
    while wave is not None:
        wave = next_wave(evaluate(wave))
