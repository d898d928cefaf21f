"""`srds-fast plan`: the plan of a call, chosen by what calls cost here, and how well its time was predicted."""

from __future__ import annotations

import argparse
from typing import Any

from .. import zoo
from ..environment import environment
from ..errors import InvalidArgument
from ..files import check_file
from ..pipelines.compile import compile
from ..planner.choose import plans_of
from ..planner.plan import Candidate, Plan
from ..schedulers.verify import adds_noise
from ..solvers.registry import AUTO
from .checks import STEPS, check_place, check_steps, guidance_of, prompts_of, request_of, settings_of
from .loading import open_for
from .measure import Request, in_turn
from .output import progress, show_table
from .pictures import prediction_plot

TIMED_CALLS = 3


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the plan of a call; save and plot it if asked."""
    check_place(args)
    steps = check_steps(args.steps or STEPS)
    settings = settings_of(args, steps)
    for path in (args.save, args.plot):
        if path is not None:
            check_file(path)
    # nothing can be called without a prompt, and then nothing is measured
    asked = args.prompt or args.prompts is not None or args.model in zoo.names()
    prompts = prompts_of(args) if asked or args.calibrate is not None or args.plot is not None else ()
    if args.plot is not None and settings["method"] != AUTO:
        raise InvalidArgument("--plot was given with --method. It compares the candidates of auto. Leave one out.")
    pipe = open_for(args, steps)
    fast = compile(pipe, **settings, parallel="auto")
    with progress(1) as told:
        told("measuring")
        if args.calibrate is not None:
            guidance = guidance_of(args)
            call = {"num_inference_steps": steps} | ({} if guidance is None else {"guidance_scale": guidance})
            found = fast.calibrate(prompts, num_samples=args.calibrate, **call)
        elif settings["method"] == AUTO and not args.unmeasured and prompts:
            # one image is enough to measure what calls cost
            found = fast.plan_for(**request_of(args, prompts[:1], steps).arguments(), measure=True)
        else:
            found = fast.plan_for(num_inference_steps=steps)
    print(found)
    if settings["method"] == AUTO and found.prediction is None:
        advice = "Leave --unmeasured out" if args.unmeasured else "Give a --prompt"
        print(f"\nNothing was measured. This plan is taken when costs are not known. {advice} to measure them.")
    if args.save is not None:
        found.save(args.save)
        print(f"\n{args.save}")
    rows = []
    if args.plot is not None:
        measured = _check(pipe, found, settings, request_of(args, prompts[:1], steps))
        for candidate, seconds in measured.items():
            predicted = candidate.fixed_seconds
            times = {"predicted ms": f"{1e3 * predicted:.1f}", "measured ms": f"{1e3 * seconds:.1f}"}
            rows.append({**times, "error": f"{predicted / seconds - 1:+.0%}", "plan": candidate.name})
        show_table(rows, text=["plan"])
        prediction_plot(measured, args.plot)
        print(f"\n{args.plot}")
    return {"plan": found.to_dict(), "measured": rows, "environment": environment()}


def _check(pipe: Any, found: Plan, settings: dict[str, Any], request: Request) -> dict[Candidate, float]:
    """Run every candidate for as many iterations as were predicted: seconds of its loop, the fastest of some calls."""
    if found.prediction is None:
        raise InvalidArgument("There is no prediction to plot: the costs of this call cannot be measured before it.")
    plans = plans_of(found.prediction, found.num_inference_steps, settings, adds_noise(pipe.scheduler))
    pipes = {candidate.name: compile(pipe, plan=plan, parallel="auto") for candidate, plan in plans.items()}
    with progress(TIMED_CALLS * len(pipes)) as told:
        calls = in_turn(pipes, request, TIMED_CALLS, told)
    return {candidate: min(done.loop_seconds) for candidate, done in zip(plans, calls, strict=True)}
