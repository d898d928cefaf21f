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

from bench.command import Table, parser, writable, write
from bench.workloads.methods import NEVER
from bench.workloads.networks import SMALL
from bench.workloads.samplers import WORKLOADS, Loop

from .timing import Timed, take_turns

OFF: dict[str, Any] = {"method": "srds", "engine": "graph", "tolerance": NEVER, "max_iterations": 2}
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
    row: dict[str, Any] = {"workload": name, "steps": steps, "switch": switch, "faster": None}
    off, on = (Timed(partial(_loop, name, steps, settings)) for settings in (OFF, OFF | SWITCHES[switch]))
    take_turns((off, on), repeat)
    if off.failed or on.failed:
        return row | {"why_not": off.failed or on.failed}
    was, ran = off.ran[-1], on.ran[-1]
    row |= {"off": off.median, "on": on.median, "engine": ran.engine, "waves": ran.waves, "rows": ran.rows}
    reasons = [*ran.left_out, *([ran.reason] if ran.reason else [])]
    if (ran.waves, ran.rows) != (was.waves, was.rows):
        reasons.append(f"it ran {ran.waves} waves of {ran.rows} rows, not {was.waves} of {was.rows}")
    if reasons:
        return row | {"why_not": "; ".join(reasons)}
    return row | {"why_not": None, "faster": off.median / on.median}


def _loop(name: str, steps: int, settings: dict[str, Any]) -> Loop:
    torch.manual_seed(0)
    return WORKLOADS[name]().ours(steps, settings)


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    found = parser("bench.speed.switches", __doc__)
    known = [name for name in WORKLOADS if name != "policy"]  # the switches are of pipelines
    found.add_argument("--workloads", nargs="*", choices=known, default=["digits", "sd15"])
    found.add_argument("--steps", type=int, default=6 if SMALL else 25)
    found.add_argument("--switches", nargs="*", choices=list(SWITCHES), default=list(SWITCHES))
    found.add_argument("--repeat", type=int, default=2 if SMALL else 9, help="calls of each that are timed")
    found.add_argument("--json", type=writable)
    options = found.parse_args(arguments)
    if options.steps < 2 or options.repeat < 1:
        found.error("--steps is 2 or more, --repeat 1 or more: there is nothing to time otherwise")
    print(TABLE.heading)
    results: list[dict[str, Any]] = []
    for name in options.workloads:
        for switch in options.switches:
            row = measured(name, options.steps, switch, options.repeat)
            results.append(row)
            times = (f"{1e3 * row[how]:.2f}" if how in row else None for how in ("off", "on"))
            print(
                TABLE.line(row["faster"], *times, switch, f"{name}, {options.steps} steps", row["why_not"]), flush=True
            )
            write(options.json, results=results)
            gc.collect()  # graphs and networks of this switch
            if not SMALL:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
