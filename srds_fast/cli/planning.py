"""What `srds-fast plan` does: the plan of a call, chosen by what calls cost here, and how well that was predicted."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import zoo
from ..errors import InvalidArgument
from ..pipelines.compile import compile
from ..planner.candidates import plans_of
from ..planner.plan import Candidate, Plan
from ..schedulers.builders import adds_noise
from .commands import open_for, prompts_for, settings_of
from .comparison import Request, call
from .table import Table

TIMED_CALLS = 3


@dataclass(frozen=True)
class Checked:
    """A candidate as predicted and as measured, in seconds of the denoising loop."""

    candidate: Candidate
    measured: float


def plan(args: argparse.Namespace) -> None:
    """Print the plan of a call; save and plot it if asked."""
    pipe = open_for(args, args.steps)
    fast = compile(pipe, **settings_of(args))
    if args.calibrate is not None:
        found = fast.calibrate(
            prompts_for(args),
            num_samples=args.calibrate,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
        )
    elif args.method == "auto" and not args.unmeasured and (args.prompt or args.model in zoo.names()):
        request = Request(prompts_for(args)[:1], args.steps, args.guidance)
        found = fast.plan_for(**request.arguments(), measure=True)
    else:
        found = fast.plan_for(num_inference_steps=args.steps)
    print(found)
    if args.method == "auto" and found.prediction is None:
        print("\nNothing was measured: this is what is taken where costs are not known. Give a --prompt to measure.")
    if args.save is not None:
        found.save(args.save)
        print(f"\n{args.save}")
    if args.plot is not None:
        if found.prediction is None:
            raise InvalidArgument("There is no prediction to plot. Nothing was measured. Leave --unmeasured out.")
        request = Request(prompts_for(args)[:1], args.steps, args.guidance)
        checked = check(pipe, found, settings_of(args), request)
        print(f"\n{_table(checked)}")
        _plot(checked, args.plot)
        print(f"\n{args.plot}")


def check(pipe: Any, found: Plan, settings: dict[str, Any], request: Request) -> list[Checked]:
    """Run every candidate for as many iterations as were predicted, in turn; the fastest of some calls counts."""
    assert found.prediction is not None
    stochastic = adds_noise(pipe.scheduler)
    plans = plans_of(found.prediction, found.num_inference_steps, settings, stochastic)
    pipes = {candidate: compile(pipe, plan=plan) for candidate, plan in plans.items()}
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in pipes}
    for _ in range(TIMED_CALLS):
        for candidate, fast in pipes.items():
            report = call(fast, request).report
            assert report is not None
            times[candidate].append(report.seconds)
    return [Checked(candidate, min(seconds)) for candidate, seconds in times.items()]


def _table(checked: list[Checked]) -> str:
    table = Table([("predicted ms", 12), ("measured ms", 11), ("error", 6), ("plan", -20)])
    lines = [
        table.line(
            f"{1e3 * each.candidate.fixed_seconds:.1f}",
            f"{1e3 * each.measured:.1f}",
            f"{each.candidate.fixed_seconds / each.measured - 1:+.0%}",
            each.candidate.name,
        )
        for each in checked
    ]
    return "\n".join([table.heading(), *lines])


def _plot(checked: list[Checked], path: Path) -> None:
    """Draw measured over predicted seconds and write it as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # not pyplot: it would pick a window system for the whole process
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    most = 1.1 * max(1e3 * max(each.candidate.fixed_seconds, each.measured) for each in checked)
    axes.plot([0, most], [0, most], color="0.7", linewidth=1, zorder=0)
    for each in checked:
        sequential = each.candidate.name == "sequential"
        x, y = 1e3 * each.candidate.fixed_seconds, 1e3 * each.measured
        axes.plot(x, y, "s" if sequential else "o", color="#c2410c" if sequential else "#0064b4")
        axes.annotate(each.candidate.name, (x, y), xytext=(6, -3), textcoords="offset points", fontsize=8)
    axes.set_xlim(0, most)
    axes.set_ylim(0, most)
    axes.set_xlabel("predicted, ms")
    axes.set_ylabel("measured, ms")
    axes.grid(True, color="0.9", linewidth=0.6)
    figure.savefig(path)
