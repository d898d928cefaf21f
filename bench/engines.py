"""Latency of whole calls: the engines side by side, with the stock loop and with what the network alone takes.

    python -m bench.engines                              # every workload, 25 and 50 steps
    python -m bench.engines --workloads digits policy --steps 25
    python -m bench.engines --json engines.json

Each row is a loop: stock diffusers; ours, sequential and SRDS with a fixed number of iterations, run eagerly and
replayed from a graph of the loop or of each width of a wave. All loops of a workload are called in turn in one process,
after calls that warm up and record. First comes how many times faster than stock the median call is, then its overhead:
its seconds over the sum, for all its waves, of c(rows), the time of one network call of so many rows replayed from a
graph, measured in the same run. An overhead of 1 leaves nothing to gain around the network. A loop that fails says why,
and the others run.

How well methods converge is not looked at here. On the CPU networks are small, graphs are tapes, c(rows) is of eager
calls, and what is measured means nothing but that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from srds_fast.solvers.fixed_point.options import Collocation
from srds_fast.telemetry.environment import environment

from . import rows, timing
from .rows import DEVICE, SMALL
from .workloads import WORKLOADS, Loop, Ran, Workload

STEPS = (25, 50)
ENGINES = ("eager", "graph", "network-graphs")
# no change falls below this tolerance: every engine runs the same waves
METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "srds": {"method": "srds", "tolerance": 1e-30, "max_iterations": 2},
    "collocation": {"method": Collocation(num_nodes=24), "tolerance": 1e-30, "max_iterations": 8},
}


class _Timed:
    """Calls of one loop; what it fails with is kept."""

    def __init__(self, make: Callable[[], Loop]) -> None:
        self.seconds: list[float] = []
        self.widths: list[int] = []
        self.ran: Ran | None = None
        self.failed: str | None = None
        self._make = make
        self._loop: Loop | None = None

    def begin(self) -> None:
        """Two calls, the first of which records."""
        with self._kept():
            loop = self._loop = self._make()
            loop.call()
            loop.call()
            self.widths, self.ran = loop.widths(), loop.ran()
            if (self.ran.waves, self.ran.rows) != (len(self.widths), sum(self.widths)):
                raise RuntimeError(
                    f"it ran {self.ran.waves} waves of {self.ran.rows} rows, planned were {len(self.widths)} of "
                    f"{sum(self.widths)}"
                )

    def round(self) -> None:
        """One call."""
        assert self._loop is not None
        with self._kept():
            with timing.Stopwatch(DEVICE) as watch:
                self._loop.call()
            self.seconds.append(watch.seconds)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except Exception as why:  # whatever an engine or a device raises: the others run
            self.failed, self._loop = f"{type(why).__name__}: {' '.join(str(why).split())[:300]}", None


@torch.no_grad()
def _network_seconds(network: rows.Case, widths: list[int]) -> dict[int, float]:
    """c(rows) for these widths; without those that do not fit into memory."""
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
    loops = {("stock", "stock"): _Timed(lambda: workload.stock(steps))}
    for method, settings in METHODS.items():
        for engine in ENGINES:
            loops[method, engine] = _Timed(partial(workload.ours, steps, {**settings, "engine": engine}))
    for loop in loops.values():
        loop.begin()
    for _ in range(repeat):
        for loop in loops.values():
            if loop.failed is None:
                loop.round()
    running = [loop for loop in loops.values() if loop.failed is None]
    alone = _network_seconds(workload.network, sorted({width for loop in running for width in loop.widths}))
    stock = loops["stock", "stock"]
    found: list[dict[str, Any]] = []
    for (method, engine), loop in loops.items():
        asked = {"workload": name, "steps": steps, "method": method, "asked": engine}
        if loop.failed is not None:
            found.append({**asked, "failed": loop.failed})
            continue
        assert loop.ran is not None
        seconds = statistics.median(loop.seconds)
        network = sum(alone[width] for width in loop.widths) if set(loop.widths) <= set(alone) else None
        found.append(
            {
                **loop.ran._asdict(),
                **asked,
                "failed": None,
                "seconds": seconds,
                "fastest": min(loop.seconds),
                "slowest": max(loop.seconds),
                "over_stock": None if stock.failed is not None else statistics.median(stock.seconds) / seconds,
                "network_seconds": network,
                "overhead": None if network is None else seconds / network,
            }
        )
    return found


def _line(row: dict[str, Any]) -> str:
    label = "stock" if row["method"] == "stock" else f"{row['method']} {row['asked']}"
    if row["failed"] is not None:
        return f"{label:>23}  failed: {row['failed']}"
    over_stock = "-" if row["over_stock"] is None else f"{row['over_stock']:.2f}x"
    overhead = "-" if row["overhead"] is None else f"{row['overhead']:.2f}"
    spread = f"{1e3 * row['fastest']:.1f}, {1e3 * row['slowest']:.1f}"
    return (
        f"{label:>23}{over_stock:>8}{overhead:>10}{1e3 * row['seconds']:9.1f}{spread:>20}{row['waves']:7}"
        f"{row['rows']:6}  {row['engine']}"
    )


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        prog="python -m bench.engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--steps", nargs="*", type=int, default=[6] if SMALL else list(STEPS))
    parser.add_argument("--repeat", type=int, default=1 if SMALL else 7, help="calls of every loop that are timed")
    parser.add_argument("--json", type=rows.to_write)
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
                print(_line(row))
            for reason in dict.fromkeys(row["reason"] for row in found if row.get("reason")):
                print(f"  not the engine asked for: {reason}")
            sys.stdout.flush()
            if options.json is not None:  # after each, so that a run cut short leaves what it has
                options.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
