"""Entrants on one workload, timed in turn, and how far each is from the samples of the first, mostly the stock loop."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.speed.timing import reason, timed
from bench.workloads.problems import difference
from bench.workloads.samplers import Loop, Workload
from srds_fast import Report
from srds_fast.cli.output import show_table

STOCK, SEQUENTIAL, BY_HAND, AUTO = "stock, eager", "sequential", "by hand", "auto"
Row = dict[str, Any]
"""What an entrant took, ready for JSON: workload, steps, peer (its name), setting, and left_out, why it did not run.
If it ran also:

over_stock, over_sequential: the median call is so many times faster than the first entrant's and than our sequential
loop's; None: they did not run.
difference: p95 over the samples in grey levels; None: weights are random, or the reference did not run.
within: its setting was searched for, to keep the difference within the bound.
waves, rows, peak_rows: of a call; means, and the most. seconds, lower, upper: of a call; median and quartiles.
compile_seconds: what its first calls took beyond later ones; None: nothing was compiled.
engine, engine_reason, method: of the last call's report.
"""


@dataclass(eq=False)
class Entrant:
    """One way to make a call, and what its calls took. If one raises, the reason is kept and it is not called again.

    Attributes:
        make: makes the loop; None where `failed` says why there is none.
        setting: what it was told.
        bound: its setting was searched for: the cheapest within the bound.
        compiles: the first calls compile its network.
        reference: sample number -> what its sample is compared with, where that is not the first entrant's.
        failed: why it is not called (any more), or None.
        first_calls: seconds of the two calls that warm up.
        seconds, answers, reports: of every call after these.
    """

    name: str
    make: Callable[[], Loop] | None
    setting: str = ""
    bound: bool = False
    compiles: bool = False
    reference: Callable[[int], Tensor] | None = None
    failed: str | None = None
    loop: Loop | None = None
    first_calls: float = 0.0
    seconds: list[float] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def call(self, sample: int | None) -> None:
        """Make one call. None: make the loop and call it twice, which compiles, plans and records."""
        if self.failed is not None:
            return
        try:
            if sample is None:
                assert self.make is not None
                self.loop = self.make()
                self.first_calls = sum(timed(self.loop.call)[0] for _ in range(2))
            else:
                assert self.loop is not None
                seconds, answer = timed(partial(self.loop.call, sample))
                self.answers.append(answer.double().cpu())
                self.reports.append(self.loop.report())
                self.seconds.append(seconds)
        except Exception as why:  # whatever an engine, a compiler or a device raises: others go on
            self.failed, self.loop = reason(why), None


def told(workload: Workload, steps: int, name: str, setting: str = "", **settings: Any) -> Entrant:
    """A loop of ours with these settings."""
    return Entrant(name, partial(workload.ours, steps, settings), setting)


def measured(name: str, workload: Workload, steps: int, samples: int, every: Sequence[Entrant]) -> Iterator[list[Row]]:
    """Call all in turn, once for each sample, so that what disturbs the machine disturbs them alike.

    What compiles takes longest. It begins after the first round of the others, so that an interrupted run has these.

    Args:
        every: the first is what the others are compared with.

    Yields:
        All rows so far, after every round: the fastest first, those that did not run last.
    """
    turns = [([each for each in every if each.compiles == compiles], (None, 0)) for compiles in (False, True)]
    turns += [(list(every), (sample,)) for sample in range(1, samples)]
    for called, numbers in turns:
        for sample in numbers:
            for each in called:
                each.call(sample)
        running = [each for each in every if each.failed is None and each.seconds]
        rows = [_row(each, every[0], running, workload.problem is not None) for each in running]
        rows.sort(key=lambda row: row["seconds"])
        for each in every:
            if each not in running:
                rows.append({"peer": each.name, "setting": each.setting, "left_out": each.failed or "not timed yet"})
        yield [{"workload": name, "steps": steps, **row} for row in rows]


def _row(each: Entrant, first: Entrant, running: Sequence[Entrant], trained: bool) -> Row:
    sequential = min((one.median for one in running if one.name.startswith(SEQUENTIAL)), default=None)
    expected = first.answers if first in running else []
    if each.reference is not None:
        expected = [each.reference(sample).double().cpu() for sample in range(len(each.answers))]
    off = difference(torch.cat(each.answers), torch.cat(expected)).quantile(0.95) if trained and expected else None
    lower, upper = (float(torch.tensor(each.seconds).double().quantile(share)) for share in (0.25, 0.75))
    last = each.reports[-1]
    return {
        "peer": each.name,
        "setting": each.setting,
        "left_out": None,
        "over_stock": first.median / each.median if first in running else None,
        "over_sequential": None if sequential is None else sequential / each.median,
        "difference": None if off is None else float(off),
        "within": each.bound,
        "waves": statistics.mean(report.waves for report in each.reports),
        "rows": statistics.mean(report.rows for report in each.reports),
        "peak_rows": max(report.peak_rows for report in each.reports),
        "seconds": each.median,
        "lower": lower,
        "upper": upper,
        "compile_seconds": max(0.0, each.first_calls - 2 * each.median) if each.compiles else None,
        "engine": last.engine,
        "engine_reason": last.engine_reason,
        "method": last.method,
    }


def show(rows: Sequence[Row]) -> None:
    """Print, for every workload and number of steps, the entrants, the fastest first, then those that did not run."""
    for workload, steps in dict.fromkeys((row["workload"], row["steps"]) for row in rows):
        here = [row for row in rows if (row["workload"], row["steps"]) == (workload, steps)]
        ran = [_cells(row) for row in here if row["left_out"] is None]
        show_table(ran, text=("engine", "peer", "at"), title=f"\n{workload}, N = {steps}")
        for row in here:
            if row["left_out"] is not None:
                print(f"left out: {row['peer']}: {row['left_out']}", flush=True)


def _cells(row: Row) -> dict[str, object]:
    ms, lower, upper = (f"{1e3 * row[name]:.1f}" for name in ("seconds", "lower", "upper"))
    off, compiling = row["difference"], row["compile_seconds"]
    return {
        "x first": row["over_stock"],
        "x sequential": row["over_sequential"],
        "p95": None if off is None else f"{off:.3f}",
        "within": "yes" if row["within"] else None,
        "waves": f"{row['waves']:.1f}",
        "rows": f"{row['rows']:.1f}",
        "ms": f"{ms} ({lower}..{upper})",
        "compile s": None if compiling is None else f"{compiling:.0f}",
        "engine": row["engine"],
        "peer": row["peer"],
        "at": f"ran {row['method']}" if row["peer"] == AUTO else row["setting"],
    }
