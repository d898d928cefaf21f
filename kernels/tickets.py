"""Counters by which the last program of a launch knows that it is the last.

The last program reduces what all of them left, in a fixed order: the result is deterministic and needs no second
launch. It also sets its counters back to zero, so that nothing has to be cleared before the next launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srds_fast.errors import InvalidArgument


class Tickets:
    """Counters for launches that run one after another: one object per stream or per CUDA graph.

    A graph that is captured needs one of its own, made before the capture, which then lives as long as the graph.

    Attributes:
        counts: [samples], int32, all zero between launches.
    """

    def __init__(self, device: torch.device | str, samples: int) -> None:
        self.counts = torch.zeros(samples, dtype=torch.int32, device=device)


def counts(device: torch.device, samples: int, tickets: Tickets | None) -> Tensor:
    """Zeroed counters [>= samples] for a launch on the current stream: the caller's, or else the stream's own.

    The stream's own are made once and grow. Under capture they would be shared with whatever runs beside the graph's
    replays, so there they are made anew, at the price of one more launch in the graph.
    """
    if tickets is not None:
        if tickets.counts.device != device or len(tickets.counts) < samples:
            raise InvalidArgument(
                f"tickets holds {len(tickets.counts)} counters on {tickets.counts.device}. "
                f"It must hold {samples} or more on {device}. Pass Tickets({str(device)!r}, {samples})."
            )
        return tickets.counts
    stream = 0
    if device.type == "cuda":
        with torch.cuda.device(device):
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            return Tickets(device, samples).counts
        stream = torch.cuda.current_stream(device).cuda_stream
    kept = _KEPT.get((device, stream))
    if kept is None or len(kept.counts) < samples:
        kept = _KEPT[device, stream] = Tickets(device, max(samples, _FEWEST))
    return kept.counts


_FEWEST = 64
_KEPT: dict[tuple[torch.device, int], Tickets] = {}
