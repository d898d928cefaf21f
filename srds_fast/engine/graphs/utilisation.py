"""The share of a network call in which its device works. A graph only removes the pauses between launches."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .. import cancellation

# Above this share nothing is recorded. Elsewhere graphs were measured to gain a quarter to a half at shares of 0.3 to
# 0.6; on networks that keep their device busy they gained nothing and took gigabytes.
BUSY = 0.85
CALLS = 3


def why_not_worth(call: Callable[[], object], device: torch.device) -> str | None:
    """Why recording a network call would gain nothing, or None; measured now."""
    share = utilisation(call, device)
    if share < BUSY:
        return None
    return f"the device is busy for {share:.0%} of a network call, so a graph would save almost no time"


@torch.no_grad()
def utilisation(call: Callable[[], object], device: torch.device) -> float:
    """The share of a network call in which its CUDA device works: calls queued behind a pause against launched ones."""

    def calls() -> None:
        for _ in range(CALLS):
            cancellation.look_within()
            call()

    with torch.cuda.device(device):
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
