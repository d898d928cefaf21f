"""The share of a network call in which its device works. A graph only removes the pauses between launches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from ...solvers.contract import Evaluate
from .capturable import Capturable

# Above this share nothing is recorded. Elsewhere graphs were measured to gain a quarter to a half at shares of 0.3 to
# 0.6; on networks that keep their device busy they gained nothing and took gigabytes.
BUSY = 0.85
CALLS = 3


def why_not_worth(share: float) -> str | None:
    """Why recording would gain nothing at this share, or None."""
    if share < BUSY:
        return None
    return f"the device is busy for {share:.0%} of a network call: a graph would save next to nothing and take memory"


@torch.no_grad()
def utilisation(call: Capturable, evaluate: Callable[[Evaluate], Tensor]) -> float:
    """The share of a network call in which its CUDA device works, for a wave of the most frequent width.

    Measured on zeros: once as the host launches the calls, once with all launches queued behind a pause.
    """
    width, _ = Counter(map(len, call.positions)).most_common(1)[0]
    wave = call.wave_of_zeros(width)

    def calls() -> None:
        for _ in range(CALLS):
            evaluate(wave)

    with torch.cuda.device(call.device):
        calls()
        torch.cuda.synchronize()
        started = time.perf_counter()
        calls()
        torch.cuda.synchronize()
        launched = time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The pause is long enough for the host to queue all of them. It is in cycles, at most two a nanosecond.
        torch.cuda._sleep(int(2 * launched * 2e9))
        begin.record()
        calls()
        end.record()
        torch.cuda.synchronize()
    busy: float = begin.elapsed_time(end) / 1e3
    return min(1.0, busy / launched)
