"""Latency of whole calls: the engines side by side, with the stock loop and with what the network alone takes.

    python -m bench.engines                              # every workload, 25 and 50 steps
    python -m bench.engines --workloads digits policy --steps 25
    python -m bench.engines --json engines.json

Each row is a loop: stock diffusers; ours, sequential and SRDS with a fixed number of iterations, run eagerly and
replayed from a graph of the loop or of each width of a wave. All loops of a workload are called in turn in one process,
after calls that warm up and record. First comes how many times faster than stock the median call is, then its overhead:
its seconds over the sum, for all its waves, of c(rows), the time of one network call of so many rows replayed from a
graph, measured in the same run. An overhead of 1 leaves nothing to gain around the network.

How well methods converge is not looked at here. On the CPU networks are small, graphs are tapes, c(rows) is of eager
calls, and what is measured means nothing but that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from srds_fast.cli.environment import environment
from srds_fast.methods import Collocation

from . import rows, timing
from .rows import DEVICE, SMALL
from .workloads import WORKLOADS, Workload

STEPS = (25, 50)
ENGINES = ("eager", "graph", "wave-graphs")
# no change falls below this tolerance: every engine runs the same waves
METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "srds": {"method": "srds", "tolerance": 1e-30, "max_iterations": 2},
    "collocation": {"method": Collocation(num_nodes=24), "tolerance": 1e-30, "max_iterations": 8},
}


@torch.no_grad()
def _network_seconds(network: rows.Case, widths: list[int]) -> dict[int, float]:
    """c(rows) for these widths."""
    if SMALL:
        return {width: timing.called_seconds(network.call(width), DEVICE, calls=1) for width in widths}
    return {width: timing.gpu_seconds(network.call(width), replays=10, calls=1) for width in widths}


def measured(name: str, workload: Workload, steps: int, repeat: int) -> list[dict[str, Any]]:
    """What every loop of a workload takes; stock comes first."""
    loops = {("stock", "stock"): workload.stock(steps)}
    for method, settings in METHODS.items():
        for engine in ENGINES:
            loops[method, engine] = workload.ours(steps, {**settings, "engine": engine})
    for loop in loops.values():
        loop.call()  # records
        loop.call()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in loops}
    for _ in range(repeat):
        for key, loop in loops.items():
            with timing.Stopwatch(DEVICE) as watch:
                loop.call()
            times[key].append(watch.seconds)
    widths = {key: loop.widths() for key, loop in loops.items()}
    alone = _network_seconds(workload.network, sorted({width for each in widths.values() for width in each}))
    found: list[dict[str, Any]] = []
    for (method, engine), loop in loops.items():
        planned = widths[method, engine]
        seconds, network = statistics.median(times[method, engine]), sum(alone[width] for width in planned)
        ran = loop.ran()
        assert (ran.waves, ran.rows) == (len(planned), sum(planned)), "it ran other waves than planned"
        found.append(
            {
                **ran._asdict(),
                "workload": name,
                "steps": steps,
                "method": method,
                "asked": engine,
                "seconds": seconds,
                "fastest": min(times[method, engine]),
                "slowest": max(times[method, engine]),
                "over_stock": statistics.median(times["stock", "stock"]) / seconds,
                "network_seconds": network,
                "overhead": seconds / network,
            }
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        prog="python -m bench.engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--steps", nargs="*", type=int, default=[6] if SMALL else list(STEPS))
    parser.add_argument("--repeat", type=int, default=1 if SMALL else 7, help="calls of every loop that are timed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    print(f"{'':23}{'x stock':>8}{'overhead':>10}{'ms':>9}{'fastest, slowest':>20}{'waves':>7}{'rows':>6}  engine")
    for name in options.workloads:
        torch.manual_seed(0)
        workload = WORKLOADS[name]()
        for steps in options.steps:
            found = measured(name, workload, steps, options.repeat)
            results += found
            print(f"{name}, {steps} steps")
            for row in found:
                label = "stock" if row["method"] == "stock" else f"{row['method']} {row['asked']}"
                spread = f"{1e3 * row['fastest']:.1f}, {1e3 * row['slowest']:.1f}"
                print(
                    f"{label:>23}{row['over_stock']:7.2f}x{row['overhead']:10.2f}{1e3 * row['seconds']:9.1f}"
                    f"{spread:>20}{row['waves']:7}{row['rows']:6}  {row['engine']}"
                )
            for reason in dict.fromkeys(row["reason"] for row in found if row["reason"]):
                print(f"  not the engine asked for: {reason}")
            sys.stdout.flush()
            if options.json is not None:  # after each, so that a run cut short leaves what it has
                options.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
