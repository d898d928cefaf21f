"""Latency of whole calls: the engines side by side, with the stock loop and with what the network alone takes.

    python -m bench.speed.engines                              # every workload, 25 and 50 steps
    python -m bench.speed.engines --workloads digits policy --steps 25 --json engines.json

Loops are called in turn in one process: stock diffusers; ours, sequential, SRDS and collocation with a fixed number of
iterations, eager and replayed from a graph of the loop, or from graphs of the network. "overhead" is the median call
over the sum of c(rows) of its waves, the network calls replayed from a graph in the same run: 1 leaves nothing to gain
around the network. A loop that fails says why, and the others run. Convergence is not looked at. On a CPU networks are
small, and what is meant to be replayed runs eagerly: the figures mean nothing there.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch

from bench.command import Table, milliseconds, parser, writable, write
from bench.workloads.methods import NEVER
from bench.workloads.networks import DEVICE, SMALL, Network
from bench.workloads.samplers import WORKLOADS, Workload
from srds_fast.solvers.fixed_point.options import Collocation

from . import timing
from .timing import Timed, take_turns

STEPS = (25, 50)
ENGINES = ("eager", "graph", "network-graphs")
METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "srds": {"method": "srds", "tolerance": NEVER, "max_iterations": 2},
    "collocation": {"method": Collocation(num_nodes=24), "tolerance": NEVER, "max_iterations": 8},
}
TABLE = Table(
    ("x stock", 0), ("overhead", 0), ("ms (fastest..slowest)", 24), ("waves", 0), ("rows", 0), ("method", -12),
    ("asked", -11), ("ran", -11), ("why", -1),
)  # fmt: skip


@torch.no_grad()
def network_seconds(network: Network, widths: list[int]) -> dict[int, float]:
    """c(rows) for these widths, without those that do not fit into memory."""
    found = {}
    for width in widths:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            if SMALL:
                found[width] = timing.called_seconds(network.call(width), DEVICE, calls=1)
            else:
                found[width] = timing.gpu_seconds(network.call(width), replays=10, calls=1)
    return found


def measured(name: str, workload: Workload, steps: int, repeat: int) -> list[dict[str, Any]]:
    """What every loop of a workload takes, or why it failed; stock comes first."""
    loops = {("stock", "stock"): Timed(lambda: workload.stock(steps))}
    for method, settings in METHODS.items():
        for engine in ENGINES:
            loops[method, engine] = Timed(partial(workload.ours, steps, {**settings, "engine": engine}))
    take_turns(loops.values(), repeat)
    widths = {key: timed.loop.widths() for key, timed in loops.items() if timed.failed is None}
    alone = network_seconds(workload.network, sorted({width for each in widths.values() for width in each}))
    stock = loops["stock", "stock"]
    found: list[dict[str, Any]] = []
    for (method, engine), timed in loops.items():
        row = {"workload": name, "steps": steps, "method": method, "asked": engine, "failed": timed.failed}
        if timed.failed is None:
            known = all(width in alone for width in widths[method, engine])
            network = sum(alone[width] for width in widths[method, engine]) if known else None
            row = {
                **timed.ran[-1]._asdict(),
                **row,
                "seconds": timed.median,
                "fastest": min(timed.seconds),
                "slowest": max(timed.seconds),
                "over_stock": None if stock.failed is not None else stock.median / timed.median,
                "network_seconds": network,
                "overhead": None if network is None else timed.median / network,
            }
        found.append(row)
    return found


def line(row: dict[str, Any]) -> str:
    if row["failed"] is not None:
        return TABLE.line(None, None, None, None, None, row["method"], row["asked"], "failed", row["failed"])
    times = milliseconds(row["seconds"], (row["fastest"], row["slowest"]))
    counts = row["waves"], row["rows"], row["method"], row["asked"], row["engine"], row["reason"] or ""
    return TABLE.line(row["over_stock"], row["overhead"], times, *counts)


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    found = parser("bench.speed.engines", __doc__)
    found.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    found.add_argument("--steps", nargs="*", type=int, default=[6] if SMALL else list(STEPS))
    found.add_argument("--repeat", type=int, default=1 if SMALL else 7, help="calls of every loop that are timed")
    found.add_argument("--json", type=writable)
    options = found.parse_args(arguments)
    results: list[dict[str, Any]] = []
    for name in options.workloads:
        torch.manual_seed(0)
        workload = WORKLOADS[name]()
        for steps in options.steps:
            results += measured(name, workload, steps, options.repeat)
            here = [row for row in results if (row["workload"], row["steps"]) == (name, steps)]
            print(f"{name}, {steps} steps", TABLE.heading, *map(line, here), sep="\n", flush=True)
            write(options.json, results=results)


if __name__ == "__main__":
    main()
