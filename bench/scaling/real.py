"""Two processes of one thread, timed against one process, beside what was predicted for each.

    python -m bench.scaling.real --json bench/results/scaling-cpu.json

Needs two cores with nothing else on them. Two processes of one thread, over gloo, make one sample together; rank 0
alone makes it with one thread and with two. All three are called in turn in these two processes, each round another
sample, and the idle process waits without computing. Ratios are medians over the rounds of the ratio within a round.

Every run takes the waves that `bench.scaling` has of its method. Predicted are the seconds of the loop, in two ways,
from costs that the same processes have measured: by the planner, before the first call, from calls that both made
together; and by the simulator, in every round, from what network calls, gathers and the host take in a loop that makes
none of these runs, see `bench.scaling.probes`. "error" is predicted over measured seconds, less 1.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from bench.command import parser
from bench.speed.host_time import Case
from bench.speed.timing import timed
from srds_fast.cli.output import show_table
from srds_fast.engine.distributed import call as distributed
from srds_fast.engine.distributed.ranks import Doing, Header, Ranks, ranks_of
from srds_fast.planner.choose import fixed_at
from srds_fast.planner.search import Pricing

from .models import ALONE, RANKS, gather_of, measured
from .predict import Way, seconds, ways
from .probes import Costs, measure
from .processes import spawned
from .subjects import SUBJECTS, Subject

STEPS = (50, 100)
# one process of one thread, the same of two threads, two processes of one thread
THREADS = "two threads"
HOWS = {ALONE: (1, None), THREADS: (2, None), RANKS: (1, "auto")}
# of `host_time`: a pipeline whose network takes no time
WAVES_OF = "SDXL DDIM"
EXCHANGES = 200
METHODS = ("sequential", "srds (default)", "srds, as published", "collocation (default), stops itself")
Row = dict[str, Any]
Times = dict[str, list[tuple[float, float]]]  # (seconds of the call, of its loop) in each way, by sample


def time_ways(subject: Subject, way: Way, sample: int, found: Times) -> None:
    """Time a method in each way; all that rank 1 has done alone is to wait. sample: -1 warms up."""
    for how, (threads, parallel) in HOWS.items():
        dist.barrier()
        if parallel is None and dist.get_rank() > 0:
            continue
        torch.set_num_threads(threads)
        whole, report = timed(lambda: subject.call(way.steps, way.plan, parallel, max(0, sample)))  # noqa: B023
        torch.set_num_threads(1)
        if sample >= 0:
            found.setdefault(how, []).append((whole, report.seconds))


def priced(subject: Subject, steps: int) -> dict[str, Pricing]:
    """The planner's costs in each way; rank 1 has none of what rank 0 does alone."""
    found = {}
    for how, (threads, parallel) in HOWS.items():
        dist.barrier()
        if how == RANKS or dist.get_rank() == 0:
            torch.set_num_threads(threads)
            found[how] = subject.pricing(steps, parallel)
            torch.set_num_threads(1)
    return found


def row_of(way: Way, found: Times, pricing: dict[str, Pricing], costs: dict[str, Any]) -> Row:
    """What a method took in each way, and what was predicted. costs: of the simulator."""
    row: Row = {"method": way.name, "setting": way.setting, "waves": len(way.widths), "rows": sum(way.widths)}
    gather = gather_of(costs)
    simulated = {
        ALONE: seconds(way, measured(costs, ALONE), 1, gather),
        RANKS: seconds(way, measured(costs, RANKS), 2, gather),
    }
    for how, times in found.items():
        loop = statistics.median(each for _, each in times)
        predicted = pricing[how].of(way.plan, way.iteration)
        row[how] = {
            "call_seconds": [each for each, _ in times],
            "loop_seconds": [each for _, each in times],
            "predicted_seconds": predicted,
            "error": predicted / loop - 1,
        }
        if how in simulated:
            row[how] |= {"simulated_seconds": simulated[how], "error_of_simulator": simulated[how] / loop - 1}
    for name, which in (("call", 0), ("loop", 1)):
        for how in (ALONE, THREADS):
            pairs = zip(found[how], found[RANKS], strict=True)
            row[f"{name}_over_{how}"] = statistics.median(one[which] / two[which] for one, two in pairs)
    alone, together = (row[how]["predicted_seconds"] for how in (ALONE, RANKS))
    return {**row, "predicted_over_one thread": alone / together}


def measurements(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All that rank 0 knows so far, after every subject."""
    document: dict[str, Any] = {"samples": options.samples, "networks": {}, "results": []}
    ranks = ranks_of("auto")
    assert ranks is not None
    with distributed.sharing(ranks):
        document["exchange_seconds"] = exchange_seconds(ranks)
    dist.barrier()
    if dist.get_rank() == 0:
        document["wave_seconds"] = wave_seconds()
    for name, make in SUBJECTS.items():
        if name not in options.subjects:
            continue
        subject, grids = make(), STEPS[:1] if options.smoke else STEPS
        pricing = {steps: priced(subject, steps) for steps in grids}
        chosen = [
            way._replace(plan=fixed_at(way.plan, way.iteration))
            for steps in grids
            for way in ways(steps)[0]
            if way.name in METHODS
        ]
        times: list[Times] = [{} for _ in chosen]
        parts = {steps: subject.parts(steps) for steps in grids}
        alone, together = Costs(parts, chosen, 1), Costs(parts, chosen, ranks.size)
        for sample in range(-1, options.samples):
            for way, found in zip(chosen, times, strict=True):
                time_ways(subject, way, sample, found)
            measure(alone, together, ranks, sample)
        if dist.get_rank() == 0:
            units, unit_bytes = parts[grids[0]].units, subject.unit_bytes
            about = {"name": name, "units_of_a_row": units, "unit_bytes": unit_bytes}
            given = {ALONE: alone.document(units * unit_bytes), RANKS: together.document(units * unit_bytes)}
            costs = document["networks"][name] = {**about, **given}
            for way, found in zip(chosen, times, strict=True):
                row = row_of(way, found, pricing[way.steps], costs)
                document["results"].append({"subject": name, "steps": way.steps, **row})
        yield document


def exchange_seconds(ranks: Ranks) -> float:
    """What it takes two processes to tell each other how they fare, before each gather."""
    times = [timed(lambda: ranks.headers(Header(Doing.LOOK)))[0] for _ in range(EXCHANGES)]
    return statistics.median(times)


def wave_seconds() -> float:
    """What the host does between the network calls of two waves, as `bench.speed.host_time` times it."""
    case = Case(WAVES_OF)
    seconds_of_wave, _ = case.measured(3)["srds"]
    return seconds_of_wave


def show(document: dict[str, Any]) -> None:
    """Print a table for each subject and number of steps."""
    results = document["results"]
    for subject, steps in dict.fromkeys((row["subject"], row["steps"]) for row in results):
        here = [row for row in results if (row["subject"], row["steps"]) == (subject, steps)]
        cells = [
            {
                "method": row["method"],
                "waves": row["waves"],
                "rows": row["rows"],
                "ms, 1 process": f"{1e3 * statistics.median(row[ALONE]['loop_seconds']):.1f}",
                "2 threads": f"{1e3 * statistics.median(row[THREADS]['loop_seconds']):.1f}",
                "2 processes": f"{1e3 * statistics.median(row[RANKS]['loop_seconds']):.1f}",
                "times faster": f"{row['loop_over_one thread']:.2f}",
                "than 2 threads": f"{row['loop_over_two threads']:.2f}",
                "predicted ms": f"{1e3 * row[RANKS]['predicted_seconds']:.1f}",
                "error": f"{row[RANKS]['error']:+.0%}",
                "simulated ms": f"{1e3 * row[RANKS]['simulated_seconds']:.1f}",
                "its error": f"{row[RANKS]['error_of_simulator']:+.0%}",
                "of 1 process": f"{row[ALONE]['error_of_simulator']:+.0%}",
            }
            for row in here
        ]
        show_table(cells, text=("method",), title=f"\n{subject}, N = {steps}, two processes against one")


def main(arguments: list[str] | None = None) -> None:
    told = parser("bench.scaling.real", __doc__)
    told.add_argument("--samples", type=int, default=5, help="rounds, each another sample")
    told.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    told.add_argument("--smoke", action="store_true", help="50 steps, one round")
    options = told.parse_args(arguments)
    if options.smoke:
        options.samples = 1
    spawned(measurements, options, show)


if __name__ == "__main__":
    main()
