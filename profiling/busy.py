"""How busy a call keeps its GPU: the time in which kernels or copies run, over the time of the call.

    python -m bench.busy
    python -m bench.busy --workloads digits --steps 50 --json busy.json

A share near 1 leaves nothing to gain around the network; what is missing is launches by the host, and waiting for it.
Kernels are timed by torch's profiler in one call, the time of a call is the median of others without it: a profiler
slows the host down and not the device. On the CPU it is the time inside operations, and means nothing but that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from srds_fast.cli.environment import environment
from srds_fast.cli.table import Table

from .intervals import covered
from .rows import DEVICE, SMALL
from .timing import Stopwatch
from .workloads import WORKLOADS, Loop, Workload

LOOPS: dict[str, dict[str, Any]] = {
    "sequential, eager": {"method": "sequential", "engine": "eager"},
    "sequential, graph": {"method": "sequential", "engine": "graph"},
    "srds, eager": {"method": "srds", "engine": "eager", "tolerance": 1e-30, "max_iterations": 2},
    "srds, graph": {"method": "srds", "engine": "graph", "tolerance": 1e-30, "max_iterations": 2},
}


def measured(loop: Loop, calls: int) -> dict[str, Any]:
    """Of a call: seconds, those in which the device works, the share, and what was launched on it."""
    for _ in range(2):  # records
        loop.call()
    times = []
    for _ in range(calls):
        with Stopwatch(DEVICE) as watch:
            loop.call()
        times.append(watch.seconds)
    here, activity = (DeviceType.CPU, ProfilerActivity.CPU) if SMALL else (DeviceType.CUDA, ProfilerActivity.CUDA)
    with profile(activities=[activity]) as profiled, Stopwatch(DEVICE):
        loop.call()
    ranges = [
        event.time_range
        for event in profiled.events()
        if event.device_type == here and not getattr(event, "is_user_annotation", False)
    ]
    working = covered((int(1e3 * each.start), int(1e3 * each.end)) for each in ranges) / 1e9
    seconds = statistics.median(times)
    return {
        "seconds": seconds,
        "busy_seconds": working,
        "busy": min(1.0, working / seconds),
        "launched": len(ranges),
        "launched_per_wave": len(ranges) / loop.ran().waves,
        "engine": loop.ran().engine,
    }


def of_workload(name: str, workload: Workload, steps: int, calls: int) -> list[dict[str, Any]]:
    """The stock loop and ours."""
    loops = {"stock": workload.stock(steps), **{each: workload.ours(steps, how) for each, how in LOOPS.items()}}
    return [{"workload": name, "steps": steps, "loop": each, **measured(loop, calls)} for each, loop in loops.items()]


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        prog="python -m bench.busy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), default=["digits", "policy", "sd15"])
    parser.add_argument("--steps", type=int, default=6 if SMALL else 25)
    parser.add_argument("--calls", type=int, default=1 if SMALL else 5, help="that are timed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    columns = Table([("busy", 5), ("ms", 8), ("launched a wave", 0), ("loop", -20), ("ran", -12), ("of", -1)])
    print(columns.heading())
    results: list[dict[str, Any]] = []
    for name in options.workloads:
        torch.manual_seed(0)
        found = of_workload(name, WORKLOADS[name](), options.steps, options.calls)
        results += found
        for each in found:
            counts = f"{1e3 * each['seconds']:.1f}", f"{each['launched_per_wave']:.0f}"
            of = f"{name}, {options.steps} steps"
            print(columns.line(f"{each['busy']:.2f}", *counts, each["loop"], each["engine"], of), flush=True)
        if options.json is not None:  # after each, so that a run cut short leaves what it has
            options.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
