"""How busy a call keeps its GPU: the time in which kernels or copies run, over the time of the call.

    python -m profiling.busy
    python -m profiling.busy --workloads digits --steps 50 --json busy.json

A share near 1 leaves nothing to gain around the network; what is missing is launches by the host, and waiting for it.
Kernels are timed by torch's profiler in one call, the time of a call is the median of others without it: a profiler
slows the host down and not the device. On a CPU it is the time inside operations, and means nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.command import parser, write
from bench.speed.timing import timed
from bench.workloads.methods import SRDS_TWICE
from bench.workloads.networks import SMALL
from bench.workloads.samplers import WORKLOADS, Loop
from srds_fast.cli.output import show_table

LOOPS: dict[str, dict[str, Any]] = {
    "sequential, eager": {"method": "sequential", "engine": "eager"},
    "sequential, graph": {"method": "sequential", "engine": "graph"},
    "srds, eager": {**SRDS_TWICE, "engine": "eager"},
    "srds, graph": {**SRDS_TWICE, "engine": "graph"},
}


def covered(stretches: Iterable[tuple[float, float]]) -> float:
    """The time that any of these stretches covers."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(stretches):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def measured(loop: Loop, calls: int) -> dict[str, Any]:
    """Of a call: seconds, those in which the device works, the share, and what was launched on it."""
    for _ in range(2):  # records
        loop.call()
    seconds = statistics.median(timed(loop.call)[0] for _ in range(calls))
    here, activity = (DeviceType.CPU, ProfilerActivity.CPU) if SMALL else (DeviceType.CUDA, ProfilerActivity.CUDA)
    with profile(activities=[activity]) as profiled:
        timed(loop.call)
    events = [event for event in profiled.events() if event.device_type == here]
    ranges = [event.time_range for event in events if not getattr(event, "is_user_annotation", False)]
    working = covered((each.start, each.end) for each in ranges) / 1e6  # of microseconds
    found = {"seconds": seconds, "busy_seconds": working, "busy": min(1.0, working / seconds), "launched": len(ranges)}
    report = loop.report()
    return {**found, "launched_per_wave": len(ranges) / report.waves, "engine": report.engine}


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    found = parser("profiling.busy", __doc__)
    found.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), default=["digits", "policy", "sd15"])
    found.add_argument("--steps", type=int, default=6 if SMALL else 25)
    found.add_argument("--calls", type=int, default=1 if SMALL else 5, help="that are timed")
    options = found.parse_args(arguments)
    results: list[dict[str, Any]] = []
    for name in options.workloads:
        torch.manual_seed(0)
        workload = WORKLOADS[name]()
        loops = {"stock": workload.stock(options.steps)}
        loops |= {loop: workload.ours(options.steps, how) for loop, how in LOOPS.items()}
        rows: list[dict[str, object]] = []
        for loop, made in loops.items():
            each = measured(made, options.calls)
            results.append({"workload": name, "steps": options.steps, "loop": loop, **each})
            launched = f"{each['launched_per_wave']:.0f}"
            times = {"busy": each["busy"], "ms": f"{1e3 * each['seconds']:.1f}", "launched a wave": launched}
            rows.append({**times, "loop": loop, "ran": each["engine"]})
        show_table(rows, text=("loop", "ran"), title=f"\n{name}, {options.steps} steps")
        write(options.json, results=results)


if __name__ == "__main__":
    main()
