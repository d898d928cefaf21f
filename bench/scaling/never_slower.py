"""Whether two processes are ever slower than one where both run "auto", which may share no rows.

    python -m bench.scaling.never_slower --json never-slower.json

Needs two cores with nothing else on them. Two processes of one thread, over gloo, make one sample together; rank 0
alone makes it with one thread, and the idle process waits without computing. Each call of the two is a pair with the
call of the one beside it, of the same sample, and every other pair begins with the other. Shares are of the seconds of
whole calls: of calls 4 to 20 in total, and the medians of the shares of single pairs, which an interruption of a few
calls by other processes does not change. In calls 1 to 3 "auto" explores.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from bench.command import parser
from bench.speed.never_slower import EXPLORED
from bench.speed.timing import timed
from srds_fast import Report
from srds_fast.cli.output import show_table

from .models import ALONE, RANKS
from .processes import spawned
from .subjects import SUBJECTS

PARALLEL = {ALONE: None, RANKS: "auto"}


def pairs(call: Callable[[Any, int], Report], calls: int) -> dict[str, Any]:
    """What calls of one process and of all take. call: (parallel, sample) -> its report."""
    times: dict[str, list[float]] = {how: [] for how in PARALLEL}
    reports: dict[str, Report] = {}
    for number in range(calls):
        turns = list(PARALLEL)
        for how in turns if number % 2 else turns[::-1]:
            dist.barrier()
            if how == RANKS or dist.get_rank() == 0:
                seconds, reports[how] = timed(lambda: call(PARALLEL[how], number))  # noqa: B023
                times[how].append(seconds)
    if dist.get_rank() > 0:
        return {}
    one, two = (times[how][EXPLORED:] for how in (ALONE, RANKS))
    shares = [ours / its for ours, its in zip(two, one, strict=True)]
    return {
        "total": sum(two) / sum(one),
        "pairs": statistics.median(shares),
        "quartiles": statistics.quantiles(shares, n=4)[::2],
        "seconds": times,
        "plans": {how: report.plan or report.method for how, report in reports.items()},
        "states": {how: report.plan_state for how, report in reports.items()},
        "reasons": {how: report.plan_reason for how, report in reports.items()},
    }


def measurements(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All that rank 0 knows so far, after every subject and number of steps."""
    document: dict[str, Any] = {"calls": options.calls, "results": []}
    for name in options.subjects:
        subject = SUBJECTS[name]()
        for steps in options.steps:
            row = pairs(lambda parallel, sample: subject.call(steps, None, parallel, sample), options.calls)  # noqa: B023
            document["results"].append({"subject": name, "steps": steps, **row})
            yield document


def show(document: dict[str, Any]) -> None:
    cells = [
        {
            "subject": row["subject"],
            "N": row["steps"],
            "ms, 1 process": f"{1e3 * statistics.median(row['seconds'][ALONE][EXPLORED:]):.1f}",
            "2 processes": f"{1e3 * statistics.median(row['seconds'][RANKS][EXPLORED:]):.1f}",
            "total": row["total"],
            "pairs": row["pairs"],
            "quartiles": "{:.2f}..{:.2f}".format(*row["quartiles"]),
            "1 ran": row["plans"][ALONE],
            "2 ran": row["plans"][RANKS],
        }
        for row in document["results"]
    ]
    show_table(
        cells,
        text=("subject", "1 ran", "2 ran"),
        title=f'\n"auto", two processes over one, calls from {EXPLORED + 1} on',
    )


def main(arguments: list[str] | None = None) -> None:
    told = parser("bench.scaling.never_slower", __doc__)
    told.add_argument("--calls", type=int, default=20)
    told.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    told.add_argument("--steps", nargs="+", type=int, default=[50])
    options = told.parse_args(arguments)
    spawned(measurements, options, show)


if __name__ == "__main__":
    main()
