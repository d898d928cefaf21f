"""Whether a network call keeps its device busy: graphs remove the time between launches, and there may be none."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from ...solvers.contract import Evaluate
from .capturable import Capturable

# of a network call's time, the share in which the device works. Elsewhere graphs were measured to gain a quarter to a
# half at shares of 0.3 to 0.6, and nothing but gigabytes spent on networks that keep their device busy.
BUSY = 0.85
CALLS = 3


def why_not_worth(share: float) -> str | None:
    """Why recording would gain nothing at this busy share, or None."""
    if share < BUSY:
        return None
    return f"the device is busy for {share:.0%} of a network call: a graph would save next to nothing and take memory"


@torch.no_grad()
def busy_share(call: Capturable, evaluate: Callable[[Evaluate], Tensor]) -> float:
    """The share of a network call, of the width that is most frequent, in which its CUDA device works.

    Measured on zeros: once as the host launches them, once with all launches queued behind a pause.
    """
    x, device = call.inputs["x"], call.device
    width, _ = Counter(len(positions) for positions in call.positions).most_common(1)[0]
    number = next(number for number, positions in enumerate(call.positions) if len(positions) == width)
    rows = call.network.empty(width, x).zero_()
    wave = Evaluate(rows, call.positions[number], tuple(range(len(x))), number)

    def calls() -> None:
        for _ in range(CALLS):
            evaluate(wave)

    with torch.cuda.device(device):
        calls()
        torch.cuda.synchronize()
        started = time.perf_counter()
        calls()
        torch.cuda.synchronize()
        launched = time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # long enough for the host to queue all of them; in cycles of at most two a nanosecond
        torch.cuda._sleep(int(2 * launched * 2e9))
        begin.record()
        calls()
        end.record()
        torch.cuda.synchronize()
    busy: float = begin.elapsed_time(end) / 1e3
    return min(1.0, busy / launched)
