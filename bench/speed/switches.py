"""What each way to make a call faster brings: every switch on and off, one row each.

    python -m bench.speed.switches                               # digits and sd15, 25 steps, SRDS replayed from a graph
    python -m bench.speed.switches --workloads digits --steps 50 --switches streams torch_compile --json switches.json

Off is `srds_fast.compile` with engine="graph"; on differs in one setting, on a pipeline of its own, as some switches
stay with the network. Both run the same waves, in turn. A switch that cannot be had says why.
"""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch

from bench.command import Table, parser, write
from bench.runner import Entrant, take_turns
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
TABLE = Table(("x faster", 0), ("off ms", 8), ("on ms", 8), ("switch", -14), ("of", -18), ("not had because", -1))


def measured(name: str, steps: int, switch: str, repeat: int) -> dict[str, Any]:
    """A switch on a workload: seconds on and off, or why not."""

    def make(settings: dict[str, Any]) -> Loop:
        torch.manual_seed(0)
        return WORKLOADS[name]().ours(steps, settings)

    off, on = (Entrant(switch, partial(make, settings)) for settings in (OFF, OFF | SWITCHES[switch]))
    for _ in take_turns((off, on), repeat):
        pass
    row: dict[str, Any] = {"workload": name, "steps": steps, "switch": switch, "why_not": off.failed or on.failed}
    if row["why_not"] is None:
        was, ran = off.reports[-1], on.reports[-1]
        reasons = [*ran.left_out, *([ran.engine_reason] if ran.engine_reason else [])]
        if (ran.waves, ran.rows) != (was.waves, was.rows):
            reasons.append(f"it ran {ran.waves} waves of {ran.rows} rows, not {was.waves} of {was.rows}")
        row |= {"off": off.median, "on": on.median, "engine": ran.engine, "waves": ran.waves, "rows": ran.rows}
        row |= {"why_not": "; ".join(reasons) or None}
    return row | {"faster": None if row["why_not"] else row["off"] / row["on"]}


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
    print(TABLE.heading)
    results: list[dict[str, Any]] = []
    for name in options.workloads:
        for switch in options.switches:
            row = measured(name, options.steps, switch, options.repeat)
            results.append(row)
            times = [f"{1e3 * row[how]:.2f}" if how in row else None for how in ("off", "on")]
            about = f"{name}, {options.steps} steps", row["why_not"]
            print(TABLE.line(row["faster"], *times, switch, *about), flush=True)
            write(options.json, results=results)
            gc.collect()  # graphs and networks of this switch
            if not SMALL:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
