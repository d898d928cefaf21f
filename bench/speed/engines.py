"""Latency of whole calls: the engines side by side, with the stock loop and with what the network alone takes.

    python -m bench.speed.engines                              # every workload, 25 and 50 steps
    python -m bench.speed.engines --workloads digits policy --steps 25 --json engines.json
    python -m bench.speed.engines --switches --workloads digits sd15    # every way to make a call faster, on and off

Loops are called in turn in one process: stock diffusers; ours, sequential, SRDS and collocation with a fixed number of
iterations, eager and replayed from a graph of the loop, or from graphs of the network. "overhead" is the median call
over the sum of c(rows) of its waves, the network calls replayed from a graph in the same run: 1 leaves nothing to gain
around the network. On a CPU networks are tiny, and what is meant to be replayed runs eagerly: the figures mean nothing.

--switches compares SRDS replayed from a graph, "off", with the same waves and one other setting.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch

from bench.command import parser, write
from bench.runner import STOCK, Entrant, Row, measured, show, told
from bench.workloads.methods import SRDS_TWICE, fixed_methods
from bench.workloads.networks import SMALL
from bench.workloads.samplers import WORKLOADS, Loop, Workload

from .timing import device_seconds

ENGINES = ("eager", "graph", "network-graphs")
METHODS = ("sequential", "srds", "collocation")
SWITCHES: dict[str, dict[str, Any]] = {
    "off": {},
    "streams": {"overlap": "streams"},
    # the next iteration is launched before the change of the last one is looked at
    "late stop": {"tolerance": 0.0},
    "network graphs": {"engine": "network-graphs"},
    "channels_last": {"channels_last": True},
    "xformers": {"attention": "xformers"},
    "torch_compile": {"torch_compile": "default"},
}


def of_workload(name: str, workload: Workload, steps: int, repeat: int) -> list[Row]:
    """What every loop of a workload takes, or why it failed; with its overhead, if all its waves fit into memory."""
    every = [Entrant(STOCK, partial(workload.stock, steps))]
    for method in METHODS:
        settings = fixed_methods(steps)[method]
        every += [told(workload, steps, f"{method}, {engine}", **settings, engine=engine) for engine in ENGINES]
    *_, rows = measured(name, workload, steps, repeat, every)
    widths = {each.name: each.loop.widths() for each in every if each.loop is not None}
    alone: dict[int, float] = {}
    for width in sorted({width for each in widths.values() for width in each}):
        with torch.no_grad(), contextlib.suppress(torch.cuda.OutOfMemoryError):
            alone[width] = device_seconds(workload.network_call(width), replays=10, calls=1)
    for row in rows:
        if row["left_out"] is None and set(widths[row["peer"]]) <= set(alone):
            row["network_seconds"] = sum(alone[width] for width in widths[row["peer"]])
            row["overhead"] = row["seconds"] / row["network_seconds"]
            row["setting"] = f"overhead {row['overhead']:.2f}; {row['engine_reason'] or ''}".rstrip("; ")
    return rows


def switched(name: str, workload: Workload, steps: int, repeat: int) -> list[Row]:
    """Every switch against off. Each has a pipeline of its own, as some switches stay with the network."""

    def make(settings: dict[str, Any]) -> Loop:
        torch.manual_seed(0)
        return WORKLOADS[name]().ours(steps, {**SRDS_TWICE, "engine": "graph", **settings})

    every = {each: Entrant(each, partial(make, settings)) for each, settings in SWITCHES.items()}
    *_, rows = measured(name, workload, steps, repeat, list(every.values()))
    off = every["off"].reports[-1:]
    for row in rows:
        if row["left_out"] is None and row["peer"] != "off":
            ran = every[row["peer"]].reports[-1]
            reasons = [*ran.left_out, *filter(None, [ran.engine_reason])]
            if off and (ran.waves, ran.rows) != (off[0].waves, off[0].rows):
                reasons.append(f"it ran {ran.waves} waves of {ran.rows} rows, not {off[0].waves} of {off[0].rows}")
            row["left_out"] = "; ".join(reasons) or None
    return sorted(rows, key=lambda row: row["left_out"] is not None)


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    found = parser("bench.speed.engines", __doc__)
    found.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    found.add_argument("--steps", nargs="*", type=int, default=[6] if SMALL else [25, 50])
    found.add_argument("--repeat", type=int, default=1 if SMALL else 7, help="calls of every loop that are timed")
    found.add_argument("--switches", action="store_true", help="compare the switches, which are of pipelines")
    options = found.parse_args(arguments)
    if options.switches and ("policy" in options.workloads or min(options.steps) < 2):
        found.error("--switches is for pipelines, and two steps or more: name --workloads without policy.")
    results: list[Row] = []
    for name in options.workloads:
        torch.manual_seed(0)
        workload = WORKLOADS[name]()
        for steps in options.steps:
            rows = (switched if options.switches else of_workload)(name, workload, steps, options.repeat)
            results += rows
            show(rows)
            write(options.json, results=results)


if __name__ == "__main__":
    main()
