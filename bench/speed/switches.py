"""What each way to make a call faster brings: every switch against "off", one row each.

    python -m bench.speed.switches                               # digits and sd15, 25 steps, SRDS replayed from a graph
    python -m bench.speed.switches --workloads digits --steps 50 --switches streams torch_compile --json switches.json

Off is `srds_fast.compile` with engine="graph"; a switch differs in one setting, on a pipeline of its own, as some
switches stay with the network. All run the same waves, in turn. A switch that cannot be had says why.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bench.command import parser, write
from bench.runner import Entrant, Row, measured, table
from bench.workloads.methods import SRDS_TWICE
from bench.workloads.networks import SMALL
from bench.workloads.samplers import WORKLOADS, Loop

OFF: dict[str, Any] = {**SRDS_TWICE, "engine": "graph"}
SWITCHES: dict[str, dict[str, Any]] = {
    "streams": {"overlap": "streams"},
    # the next iteration is launched before the change of the last one is looked at
    "late stop": {"tolerance": 0.0},
    "network graphs": {"engine": "network-graphs"},
    "channels_last": {"channels_last": True},
    "xformers": {"attention": "xformers"},
    "torch_compile": {"torch_compile": "default"},
}


def of_workload(name: str, steps: int, switches: list[str], repeat: int) -> list[Row]:
    """Off and the switches on a workload; a switch that was not applied is left out, with the reason."""

    def make(settings: dict[str, Any]) -> Loop:
        torch.manual_seed(0)
        return WORKLOADS[name]().ours(steps, settings)

    off, *on = (Entrant(each, partial(make, OFF | SWITCHES.get(each, {}))) for each in ("off", *switches))
    *_, rows = measured(name, WORKLOADS[name](), steps, repeat, [off, *on])
    for each in on:
        if each.failed is None and off.failed is None:
            ran, was = each.reports[-1], off.reports[-1]
            reasons = [*ran.left_out, *filter(None, [ran.engine_reason])]
            if (ran.waves, ran.rows) != (was.waves, was.rows):
                reasons.append(f"it ran {ran.waves} waves of {ran.rows} rows, not {was.waves} of {was.rows}")
            row = next(row for row in rows if row["peer"] == each.name)
            row["left_out"] = "; ".join(reasons) or None
    return sorted(rows, key=lambda row: row["left_out"] is not None)


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    found = parser("bench.speed.switches", __doc__)
    known = [name for name in WORKLOADS if name != "policy"]  # the switches are of pipelines
    found.add_argument("--workloads", nargs="*", choices=known, default=["digits", "sd15"])
    found.add_argument("--steps", type=int, default=6 if SMALL else 25)
    found.add_argument("--switches", nargs="*", choices=list(SWITCHES), default=list(SWITCHES))
    found.add_argument("--repeat", type=int, default=2 if SMALL else 9, help="calls of each that are timed")
    options = found.parse_args(arguments)
    if options.steps < 2:
        found.error("--steps is 2 or more: one step has nothing to overlap")
    results: list[Row] = []
    for name in options.workloads:
        rows = of_workload(name, options.steps, options.switches, options.repeat)
        results += rows
        print(*table(rows), sep="\n", flush=True)
        write(options.json, results=results)


if __name__ == "__main__":
    main()
