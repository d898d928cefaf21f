"""What each way to make a call faster brings: every switch on and off, one row each.

    python -m bench.switches                               # digits and sd15, 25 steps, SRDS replayed from a graph
    python -m bench.switches --workloads digits --steps 50 --switches streams torch_compile
    python -m bench.switches --json switches.json

Off is the default of `srds_fast.compile` with engine="graph"; on differs in one setting alone, on a pipeline of its
own, as some switches stay with the network. Both are called in turn after calls that record and compile; first comes
how many times faster on is. All run the same waves. A switch that cannot be had says why.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from srds_fast.cli.table import Table
from srds_fast.errors import SrdsFastError
from srds_fast.telemetry.environment import environment

from .rows import DEVICE, SMALL
from .timing import Stopwatch
from .workloads import WORKLOADS, Loop

# no change falls below this tolerance: all run the same waves
OFF: dict[str, Any] = {"method": "srds", "engine": "graph", "tolerance": 1e-30, "max_iterations": 2}
SWITCHES: dict[str, dict[str, Any]] = {
    "streams": {"overlap": "streams"},
    # what comes next is launched before the change of an iteration is looked at
    "late stop": {"tolerance": 0.0},
    "network graphs": {"engine": "network-graphs"},
    "channels_last": {"channels_last": True},
    "xformers": {"attention": "xformers"},
    "torch_compile": {"torch_compile": "default"},
}
WARM_UP = 3


def measured(name: str, steps: int, switch: str, repeat: int) -> dict[str, Any]:
    """A switch on a workload: seconds on and off, or why not."""
    row: dict[str, Any] = {"workload": name, "steps": steps, "switch": switch, "faster": None, "why_not": None}
    try:
        loops = {how: _loop(name, steps, settings) for how, settings in (("off", OFF), ("on", OFF | SWITCHES[switch]))}
        for loop in loops.values():
            for _ in range(WARM_UP):
                loop.call()
        times: dict[str, list[float]] = {how: [] for how in loops}
        for _ in range(repeat):
            for how, loop in loops.items():
                with Stopwatch(DEVICE) as watch:
                    loop.call()
                times[how].append(watch.seconds)
    except (SrdsFastError, torch.OutOfMemoryError) as why:
        return row | {"why_not": f"{type(why).__name__}: {str(why).partition('. ')[0]}"}
    ran = {how: loop.ran() for how, loop in loops.items()}
    row |= {how: statistics.median(each) for how, each in times.items()}
    row |= {"times": times, "engine": ran["on"].engine, "waves": ran["on"].waves, "rows": ran["on"].rows}
    reasons = [*ran["on"].left_out, *([ran["on"].reason] if ran["on"].reason else [])]
    if (ran["on"].waves, ran["on"].rows) != (ran["off"].waves, ran["off"].rows):
        reasons.append(f"it ran {ran['on'].waves} waves of {ran['on'].rows} rows, not {ran['off'].waves}")
    if reasons:
        return row | {"why_not": "; ".join(reasons)}
    return row | {"faster": row["off"] / row["on"]}


def _loop(name: str, steps: int, settings: dict[str, Any]) -> Loop:
    torch.manual_seed(0)
    return WORKLOADS[name]().ours(steps, settings)


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        prog="python -m bench.switches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name in WORKLOADS if name != "policy"]  # which no pipeline calls
    parser.add_argument("--workloads", nargs="*", choices=known, default=["digits", "sd15"])
    parser.add_argument("--steps", type=int, default=6 if SMALL else 25)
    parser.add_argument("--switches", nargs="*", choices=list(SWITCHES), default=list(SWITCHES))
    parser.add_argument("--repeat", type=int, default=2 if SMALL else 9, help="calls of each that are timed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.repeat < 1:
        parser.error("--steps is 2 or more, --repeat 1 or more: there is nothing to time otherwise")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"{options.json} cannot be written: there is no folder {options.json.parent}. Make it first.")
    table = Table([("x faster", 0), ("off ms", 8), ("on ms", 8), ("switch", -14), ("of", -18), ("not had because", -1)])
    print(table.heading())
    results: list[dict[str, Any]] = []
    for name in options.workloads:
        for switch in options.switches:
            row = measured(name, options.steps, switch, options.repeat)
            results.append(row)
            faster = None if row["faster"] is None else f"{row['faster']:.2f}"
            seconds = (f"{1e3 * row[how]:.2f}" if how in row else None for how in ("off", "on"))
            print(table.line(faster, *seconds, switch, f"{name}, {options.steps} steps", row["why_not"]), flush=True)
            if options.json is not None:  # after each, so that a run cut short leaves what it has
                options.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
            gc.collect()  # graphs and networks of this switch
            if not SMALL:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
