"""`srds-fast generate`: images of prompts as PNG."""

from __future__ import annotations

import argparse
import re

from ..files import new_file
from ..pipelines.compile import compile
from .loading import open_for, settings_of
from .measure import Request, label


def run(args: argparse.Namespace) -> None:
    """Write the images, and say what the call took."""
    pipe = open_for(args, args.steps)
    fast = compile(pipe, **settings_of(args))
    request = Request(
        tuple(args.prompts), args.steps, args.guidance, args.seed, args.images_per_prompt, args.negative_prompt
    )
    args.out.mkdir(parents=True, exist_ok=True)
    label(pipe, "generate")
    for number, image in enumerate(fast(**request.arguments()).images):
        slug = re.sub(r"\W+", "-", args.prompts[number // args.images_per_prompt].lower()).strip("-")[:60] or "image"
        path = args.out / f"{slug}-seed{args.seed + number}.png"
        with new_file(path) as unfinished:
            image.save(unfinished)
        print(path)
    report = fast.report
    assert report is not None
    summary = f"{report.method}: {report.waves} waves for {report.num_inference_steps} steps, {report.seconds:.2f} s"
    print(f"\n{report if args.show_report else summary}")
