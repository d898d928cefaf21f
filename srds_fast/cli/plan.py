"""`srds-fast plan`: the plan of a call, chosen by what calls cost here, and how well its time was predicted."""

from __future__ import annotations

import argparse
from typing import Any

from .. import zoo
from ..errors import InvalidArgument
from ..files import check_file
from ..pipelines.compile import compile
from ..planner.choose import plans_of
from ..planner.plan import Candidate, Plan
from ..schedulers.verify import adds_noise
from .loading import open_for, prompts_for, settings_of
from .measure import Request, in_turn, label
from .output import show_table
from .pictures import prediction_plot

TIMED_CALLS = 3


def run(args: argparse.Namespace) -> None:
    """Print the plan of a call; save and plot it if asked."""
    for path in (args.save, args.plot):
        if path is not None:  # before minutes of measuring
            check_file(path)
    pipe = open_for(args, args.steps)
    label(pipe, "plan")
    settings = settings_of(args)
    fast = compile(pipe, **settings)
    if args.calibrate is not None:
        call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
        found = fast.calibrate(prompts_for(args), num_samples=args.calibrate, **call)
    elif args.method == "auto" and not args.unmeasured and (args.prompt or args.model in zoo.names()):
        found = fast.plan_for(**_request(args).arguments(), measure=True)
    else:
        found = fast.plan_for(num_inference_steps=args.steps)
    print(found)
    if args.method == "auto" and found.prediction is None:
        print("\nNothing was measured. This plan is taken when costs are not known. Give a --prompt to measure them.")
    if args.save is not None:
        found.save(args.save)
        print(f"\n{args.save}")
    if args.plot is not None:
        measured = _check(pipe, found, settings, _request(args))
        rows = []
        for candidate, seconds in measured.items():
            predicted = candidate.fixed_seconds
            times = {"predicted ms": f"{1e3 * predicted:.1f}", "measured ms": f"{1e3 * seconds:.1f}"}
            rows.append({**times, "error": f"{predicted / seconds - 1:+.0%}", "plan": candidate.name})
        show_table(rows, text=["plan"])
        prediction_plot(measured, args.plot)
        print(f"\n{args.plot}")


def _request(args: argparse.Namespace) -> Request:
    # one image is enough to measure what calls cost
    return Request(prompts_for(args)[:1], args.steps, args.guidance, args.seed)


def _check(pipe: Any, found: Plan, settings: dict[str, Any], request: Request) -> dict[Candidate, float]:
    """Run every candidate for as many iterations as were predicted: seconds of its loop, the fastest of some calls."""
    if found.prediction is None:
        raise InvalidArgument("There is no prediction to plot. Nothing was measured. Leave --unmeasured out.")
    plans = plans_of(found.prediction, found.num_inference_steps, settings, adds_noise(pipe.scheduler))
    pipes = {candidate.name: compile(pipe, plan=plan) for candidate, plan in plans.items()}
    calls = in_turn(pipe, pipes, request, TIMED_CALLS)
    return {candidate: min(done.loop_seconds) for candidate, done in zip(plans, calls, strict=True)}
