"""`srds-fast generate`: images of prompts as PNG."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from ..engine.cancellation import using
from ..environment import environment
from ..files import check_folder, new_file
from ..pipelines.compile import compile
from ..pipelines.loading import steps_for
from .checks import STEPS, check_place, check_steps, plan_of, prompts_of, request_of, settings_of
from .loading import open_for
from .output import progress


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the images, and say what the call took."""
    check_place(args)
    plan, prompts = plan_of(args), prompts_of(args)
    steps = check_steps(args.steps or STEPS) if plan is None else plan.num_inference_steps
    settings = settings_of(args, steps) if plan is None else {"plan": plan}
    check_folder(args.out)
    pipe = open_for(args, steps)
    if plan is not None:
        steps = steps_for(pipe, plan)
    fast = compile(pipe, **settings, parallel="auto")
    request = request_of(args, prompts, steps)
    images = _called(fast, request, steps)
    args.out.mkdir(parents=True, exist_ok=True)
    written = []
    for number, image in enumerate(images):
        prompt = prompts[number // args.images_per_prompt]
        slug = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "image"
        path = args.out / f"{slug}-seed{args.seed + number}.png"
        with new_file(path) as unfinished:
            image.save(unfinished)
        print(path)
        written.append({"path": str(path), "prompt": prompt, "seed": args.seed + number})
    report = fast.report
    assert report is not None
    print(f"\n{report if args.show_report else str(report).splitlines()[0]}")
    return {"images": written, "report": report.to_dict(), "environment": environment()}


def _called(fast: Any, request: Any, steps: int) -> Any:
    if not sys.stderr.isatty():
        return fast(**request.arguments()).images
    with progress(steps) as told:
        done = 0

        def show(wave: int, rows: int, settled: int) -> None:
            nonlocal done
            for _ in range(done, settled):
                told(f"wave {wave}")
            done = max(done, settled)

        with using(on_wave=show):
            return fast(**request.arguments()).images
