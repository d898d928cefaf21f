"""`srds-fast compare`: step counts and methods side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch

from ..environment import environment
from ..errors import InvalidArgument
from ..files import check_file, new_file
from ..methods import SRDS
from ..pipelines.compile import compile
from ..solvers.registry import AUTO, DEFAULT, REGISTERED, SEQUENTIAL
from .loading import open_for, prompts_for
from .measure import Calls, Request, grey_levels, in_turn, label
from .output import about, counted, show_table, small, warn_if_busy

METHODS = {
    **{method.name: method.about for method in REGISTERED},
    "paper": "SRDS as published: ddim jumps, sqrt(N) blocks",
    AUTO: "the plan predicted to be the fastest here",
    "exact": "srds, run until it is the sequential result",
}


def run(args: argparse.Namespace) -> None:
    """Print a table for each step count, a row for each method, and write all of them as JSON if asked."""
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        raise InvalidArgument(f"There is no method {unknown[0]!r}. Known are {', '.join(METHODS)}.")
    pipe = open_for(args, max(args.steps))
    prompts = prompts_for(args)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        check_file(args.json)
    print(
        f"{about(args, pipe, prompts)}\n"
        "iterations: of the image that needed most. seconds: of the denoising loop, the fastest of "
        f"{counted(args.calls, 'call')}, in turn.\n"
        "ratio: these seconds divided by those of sequential; below 1 is faster.\n"
    )
    print("\n".join(f"  {name:<12}{METHODS[name]}" for name in args.methods), flush=True)
    entries: list[dict[str, Any]] = []
    for steps in args.steps:
        request = Request(prompts, steps, args.guidance, args.seed)
        measured = compare(pipe, request, args.methods, args.calls)
        show_table([_cells(entry) for entry in measured], text=["method"])
        entries += measured
    warn_if_busy((entry["seconds"], entry["slowest"]) for entry in entries)
    if args.json is not None:
        asked = {name: getattr(args, name) for name in ("guidance", "seed", "dtype", "calls")}
        where = {"device": str(pipe.device), "threads": torch.get_num_threads(), "environment": environment()}
        document = {"prompts": prompts, **asked, "entries": entries, **where}
        with new_file(args.json) as unfinished:
            unfinished.write_text(json.dumps(document, indent=2) + "\n")
        print(f"\n{args.json}")


def compare(pipe: Any, request: Request, methods: Sequence[str], rounds: int = 2) -> list[dict[str, Any]]:
    """Measure methods, names out of `METHODS`, at the request's number of steps.

    The sequential method is measured in any case, as the ratio is to it. The first call of each method also warms up.

    Returns:
        For each method, ready for JSON, its counts and: "blocks" (0 for a method without), "iterations" of the image
        that needed most, "difference" to the stock pipeline, "seconds" and "slowest" of its denoising loops, and their
        "ratio" to the sequential method, below 1 being faster.
    """
    label(pipe, f"{request.steps} steps, stock pipeline")
    reference = Calls(pipe).add(request).images
    special: dict[str, dict[str, Any]] = {
        "paper": {"method": SRDS.published(request.steps)},
        "exact": {"method": DEFAULT, "exact": True},
    }
    names = list(dict.fromkeys([SEQUENTIAL, *methods]))
    pipes = {f"{request.steps} steps, {name}": compile(pipe, **special.get(name, {"method": name})) for name in names}
    done = dict(zip(names, in_turn(pipe, pipes, request, rounds), strict=True))
    entries = []
    for name in methods:
        report, seconds = done[name].report, done[name].loop_seconds
        counts = ("coarse_solver", "iterations", "waves", "rows", "peak_rows")
        entry = {"steps": request.steps, "method": name, "blocks": report.num_blocks}
        entry |= {count: getattr(report, count) for count in counts}
        entry["difference"] = grey_levels(done[name].images, reference)
        entry["ratio"] = min(seconds) / min(done[SEQUENTIAL].loop_seconds)
        entries.append({**entry, "seconds": min(seconds), "slowest": max(seconds)})
    return entries


def _cells(entry: dict[str, Any]) -> dict[str, object]:
    shown = ("steps", "method", "blocks", "iterations", "waves", "rows", "peak_rows")
    return {
        **{name.replace("_", " "): entry[name] or None for name in shown},
        **{name: small(value) for name, value in entry["difference"].items()},
        "ratio": entry["ratio"],
        "seconds": f"{entry['seconds']:.3f}",
    }
