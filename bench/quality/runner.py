"""Entrants on one workload, timed in turn, and how far each is from the stock loop's samples."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.command import Table, milliseconds
from bench.speed.timing import Timed
from bench.workloads.problems import difference
from bench.workloads.samplers import Loop, Workload

STOCK, SEQUENTIAL, BY_HAND, AUTO = "stock, eager", "sequential", "by hand", "auto"
NOT_TIMED = "it was not timed: the run ended before"
TABLE = Table(
    ("x stock", 0), ("x sequential", 0), ("p95", 6), ("within", 0), ("waves", 6), ("rows", 6), ("ms", 26),
    ("compile s", 0), ("engine", -10), ("peer", -36), ("at", -1),
)  # fmt: skip


class Entrant(NamedTuple):
    """One way to make the call.

    Attributes:
        name: for tables.
        loop: None where there is none.
        why_not: there is none.
        setting: what it was told.
        bound: its setting was searched for: the cheapest within the bound.
        compiles: the first calls compile its network.
        reference: what its samples are compared with, where that is not the stock loop.
    """

    name: str
    loop: Loop | None
    why_not: str | None = None
    setting: str = ""
    bound: bool = False
    compiles: bool = False
    reference: Loop | None = None


@dataclass(frozen=True)
class Result:
    """What an entrant took.

    Attributes:
        workload, steps, peer, setting: which entrant.
        left_out: why it did not run; all below is None then.
        over_stock, over_sequential: how many times faster than these the median call is; None: they did not run.
        difference: p95 over the samples in grey levels; None: weights are random, or the reference did not run.
        within: its setting was searched for, to keep the difference within the bound.
        waves, rows: of a call, means; peak_rows: the most.
        seconds: of a call, the median; lower, upper: quartiles.
        compile_seconds: what its first calls took beyond later ones; None: nothing was compiled.
        engine: that ran; engine_reason: why no faster one ran.
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


class _Timed(Timed):
    """An entrant, and the samples that it is compared with if they are not the stock loop's."""

    def __init__(self, entrant: Entrant) -> None:
        super().__init__(self._given)
        self.entrant, self.failed = entrant, entrant.why_not
        self.expected: list[Tensor] = []

    def _given(self) -> Loop:
        assert self.entrant.loop is not None
        return self.entrant.loop

    def _round(self, sample: int) -> None:
        super()._round(sample)
        if self.entrant.reference is not None:
            self.expected.append(self.entrant.reference.call(sample).double().cpu())


def measured(
    name: str, workload: Workload, steps: int, samples: int, every: Sequence[Entrant]
) -> Iterator[list[Result]]:
    """All results so far, after every round: the fastest first, those that did not run last.

    What compiles takes longest. It begins after the first round of the others, so that an interrupted run has these.
    """
    timed = [_Timed(each) for each in every]
    for compiles in sorted({each.entrant.compiles for each in timed}):
        now = [each for each in timed if each.entrant.compiles == compiles]
        for each in now:
            each.begin()
        yield _results(name, workload, steps, timed)
        for each in now:
            each.round()
        yield _results(name, workload, steps, timed)
    for sample in range(1, samples):
        for each in timed:
            each.round(sample)
        yield _results(name, workload, steps, timed)


def _results(name: str, workload: Workload, steps: int, timed: Sequence[_Timed]) -> list[Result]:
    running = {each.entrant.name: each for each in timed if each.failed is None and each.seconds}
    sequential = min((each.median for peer, each in running.items() if peer.startswith(SEQUENTIAL)), default=None)
    stock = running.get(STOCK)
    results = []
    for peer, each in running.items():
        expected = each.expected or (stock.answers if stock else [])
        off = None
        if workload.problem is not None and expected:
            off = float(difference(torch.cat(each.answers), torch.cat(expected)).quantile(0.95))
        lower, upper = (float(torch.tensor(each.seconds).double().quantile(share)) for share in (0.25, 0.75))
        compiling = max(0.0, each.first_calls - 2 * each.median) if each.entrant.compiles else None
        results.append(
            Result(
                workload=name,
                steps=steps,
                peer=peer,
                setting=each.entrant.setting,
                over_stock=stock.median / each.median if stock else None,
                over_sequential=None if sequential is None else sequential / each.median,
                difference=off,
                within=each.entrant.bound,
                waves=statistics.mean(one.waves for one in each.ran),
                rows=statistics.mean(one.rows for one in each.ran),
                peak_rows=max(one.peak_rows for one in each.ran),
                seconds=each.median,
                lower=lower,
                upper=upper,
                compile_seconds=compiling,
                engine=each.ran[-1].engine,
                engine_reason=each.ran[-1].reason,
                method=each.ran[-1].method,
            )
        )
    results.sort(key=lambda result: result.seconds or 0.0)
    return results + [
        Result(name, steps, each.entrant.name, each.entrant.setting, left_out=each.failed or NOT_TIMED)
        for each in timed
        if each.entrant.name not in running
    ]


def table(results: Sequence[Result]) -> Iterator[str]:
    """For every workload and number of steps the entrants, the fastest first."""
    for workload, steps in dict.fromkeys((each.workload, each.steps) for each in results):
        here = [each for each in results if (each.workload, each.steps) == (workload, steps)]
        yield f"{workload}, N = {steps}"
        yield TABLE.heading
        yield from (TABLE.line(*_cells(each)) for each in here if each.left_out is None)
        yield from (f"left out: {each.peer}: {each.left_out}" for each in here if each.left_out is not None)


def _cells(each: Result) -> list[object]:
    return [
        each.over_stock,
        each.over_sequential,
        None if each.difference is None else f"{each.difference:.3f}",
        "yes" if each.within else None,
        f"{each.waves:.1f}",
        f"{each.rows:.1f}",
        milliseconds(each.seconds or 0.0, (each.lower or 0.0, each.upper or 0.0)),
        None if each.compile_seconds is None else f"{each.compile_seconds:.0f}",
        each.engine,
        each.peer,
        f"ran {each.method}" if each.peer == AUTO else each.setting,
    ]
