"""`srds-fast compare`: step counts and methods side by side."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from ..environment import environment
from ..pipelines.compile import compile
from ..pipelines.loading import steps_for
from ..solvers.registry import BY_NAME, SEQUENTIAL
from ..telemetry.report import BY_LAW
from ..words import counted
from .checks import (
    ABOUT,
    check_place,
    check_settings,
    check_steps,
    guidance_of,
    method_of,
    plan_of,
    prompts_of,
    request_of,
)
from .loading import open_for
from .measure import Calls, Request, Told, grey_levels, in_turn
from .output import about, about_differences, progress, show_table, small, warn_if_busy

STEPS = (25, 50, 100)
# the first two that run parallel in time are those to look at first
METHODS = (SEQUENTIAL, "paper", *[name for name in BY_NAME if name != SEQUENTIAL][:2])
PLAN = "plan"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a table for each step count, a row for each method."""
    check_place(args)
    plan, prompts = plan_of(args), prompts_of(args)
    methods = list(dict.fromkeys(args.method or ((SEQUENTIAL,) if plan else METHODS)))
    every = [plan.num_inference_steps] if plan else [check_steps(steps) for steps in args.steps or STEPS]
    settings = {steps: {name: _settings(args, name, steps) for name in methods} for steps in every}
    pipe = open_for(args, max(every))
    if plan is not None:
        (chosen,) = settings.values()
        settings = {steps_for(pipe, plan): {**chosen, PLAN: {"plan": plan}}}
    print(
        f"{about(args, pipe, prompts, guidance_of(args))}.\n{about_differences(prompts)}\n"
        "iterations: of the image that needed most. seconds: of the denoising loop, the fastest of "
        f"{counted(args.calls, 'call')}, in turn.\n"
        "ratio: these seconds divided by those of sequential; below 1 is faster.\n"
    )
    lines = {**ABOUT, PLAN: f"{args.plan}: {plan.short()}" if plan else ""}
    print("\n".join(f"  {name:<12}{lines[name]}" for name in next(iter(settings.values()))), flush=True)
    entries: list[dict[str, Any]] = []
    for steps, each in settings.items():
        with progress(1 + args.calls * len({SEQUENTIAL, *each})) as told:
            measured = compare(pipe, request_of(args, prompts, steps), each, args.calls, told)
        show_table([_cells(entry) for entry in measured], text=["method"])
        others = [entry["method"] for entry in measured if entry["other_sample"]]
        if others:
            print(f"Other images of the same law, whose differences are no errors: {', '.join(others)}.\n")
        entries += measured
    warn_if_busy((entry["seconds"], entry["slowest"]) for entry in entries)
    asked = {"guidance": guidance_of(args), **{name: getattr(args, name) for name in ("seed", "dtype", "calls")}}
    where = {"device": str(pipe.device), "threads": torch.get_num_threads(), "environment": environment()}
    return {"prompts": prompts, **asked, "entries": entries, **where}


def _settings(args: argparse.Namespace, method: str, steps: int) -> dict[str, Any]:
    found = method_of(method, steps)
    found |= {name: getattr(args, name) for name in ("tolerance", "same") if getattr(args, name) is not None}
    check_settings(found)
    return found


def compare(
    pipe: Any, request: Request, settings: Mapping[str, Mapping[str, Any]], rounds: int, told: Told
) -> list[dict[str, Any]]:
    """Measure methods at the request's number of steps.

    The sequential method is measured in any case, as the ratio is to it. The first call of each method also warms up.

    Args:
        settings: of `compile`, by the name of the method.
        told: what begins next.

    Returns:
        For each method, ready for JSON, its counts and: "blocks" (0 for a method without), "iterations" of the image
        that needed most, "difference" to the pipeline's own call, "other_sample", whether it gave another one of the
        same law, "seconds" and "slowest" of its denoising loops, and their "ratio" to the sequential method, below 1
        being faster.
    """
    told(f"{request.steps} steps, the pipeline itself")
    reference = Calls(pipe).add(request).images
    every = {SEQUENTIAL: {"method": SEQUENTIAL}, **settings}
    pipes = {f"{request.steps} steps, {name}": compile(pipe, **each, parallel="auto") for name, each in every.items()}
    done = dict(zip(every, in_turn(pipes, request, rounds, told), strict=True))
    entries = []
    for name in settings:
        report, seconds = done[name].report, done[name].loop_seconds
        counts = ("coarse_solver", "iterations", "waves", "rows", "peak_rows")
        entry = {"steps": request.steps, "method": name, "ran": report.method, "blocks": report.num_blocks}
        entry |= {count: getattr(report, count) for count in counts}
        entry["other_sample"] = BY_LAW in report.stopped_by
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
