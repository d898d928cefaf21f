"""What `bench.peers` found of one of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """What one of them took.

    Attributes:
        workload, steps, peer, setting: who.
        left_out: why it did not run; all below is None then.
        over_stock, over_sequential: how many times faster than these the median call is; None: they did not run.
        difference: p95 over the samples in grey levels; None: the weights are random, or what it is compared with did
            not run.
        within: its setting was looked for to keep the difference within `entrants.BOUND`.
        waves, rows: of a call, means; peak_rows: the most.
        seconds: of a call, the median; lower, upper: quartiles.
        compile_seconds: what its first calls took beyond later ones; None: nothing was compiled.
        engine: that ran; engine_reason: why it was no faster one.
        method: that ran.
    """

    workload: str
    steps: int
    peer: str
    setting: str
    left_out: str | None = None
    over_stock: float | None = None
    over_sequential: float | None = None
    difference: float | None = None
    within: bool = False
    waves: float | None = None
    rows: float | None = None
    peak_rows: int | None = None
    seconds: float | None = None
    lower: float | None = None
    upper: float | None = None
    compile_seconds: float | None = None
    engine: str | None = None
    engine_reason: str | None = None
    method: str | None = None
