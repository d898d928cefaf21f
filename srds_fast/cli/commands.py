"""What `srds-fast generate | compare` do and print, and what the demo shares with them."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from dataclasses import asdict
from typing import Any

import torch

from .. import zoo
from ..errors import InvalidArgument, UnsupportedScheduler
from ..pipelines.compile import compile
from .comparison import CONTESTANTS, Announce, Difference, Entry, Request, compare, generators
from .environment import environment
from .loading import open_pipeline, silence
from .table import Table, small

COUNTS = [("waves", 5), ("rows", 5), ("peak rows", 9)]
GREY = [("mean", 7), ("p95", 7), ("max", 7)]
# beyond it the first call's warm-up and the usual jitter explain no longer why equal calls took unequal times
BELIEVABLE_SPREAD = 1.5


def generate(args: argparse.Namespace) -> None:
    """Write images as PNG."""
    pipe = open_for(args, args.steps)
    fast = compile(pipe, **settings_of(args))
    seeds = range(args.seed, args.seed + len(args.prompts) * args.images_per_prompt)
    options: dict[str, Any] = {}
    if args.guidance is not None:
        options["guidance_scale"] = args.guidance
    if args.negative_prompt is not None:
        options["negative_prompt"] = [args.negative_prompt] * len(args.prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    announcer(pipe)("generate")
    images = fast(
        args.prompts,
        num_inference_steps=args.steps,
        num_images_per_prompt=args.images_per_prompt,
        generator=generators(args.seed, len(seeds)),
        **options,
    ).images
    for number, (seed, image) in enumerate(zip(seeds, images, strict=True)):
        path = args.out / f"{_slug(args.prompts[number // args.images_per_prompt])}-seed{seed}.png"
        image.save(path)
        print(path)
    report = fast.report
    summary = f"{report.method}: {report.waves} waves for {report.num_inference_steps} steps, {report.seconds:.2f} s"
    print(f"\n{report if args.show_report else summary}")


def comparison(args: argparse.Namespace) -> None:
    """Print a table of step counts and methods, and write it as JSON if asked."""
    unknown = [name for name in args.methods if name not in CONTESTANTS]
    if unknown:
        raise InvalidArgument(f"There is no method {unknown[0]!r}. Known are {', '.join(CONTESTANTS)}.")
    pipe = open_for(args, max(args.steps))
    prompts = prompts_for(args)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"{about_run(args, len(prompts), pipe)}.\n"
        f"{about_difference(len(prompts))}\n"
        "iterations: of the image that needed most. seconds: of the denoising loop, the fastest of "
        f"{counted(args.calls, 'call')}, in turn.\n"
        "ratio: these seconds divided by those of sequential; below 1 is faster.\n"
    )
    for name in args.methods:
        print(f"  {name:<12}{CONTESTANTS[name].about}")
    columns = [("steps", 5), ("method", -10), ("blocks", 6), ("iterations", 10), *COUNTS, *GREY]
    table = Table([*columns, ("ratio", 6), ("seconds", 8)])
    print(f"\n{table.heading()}", flush=True)
    entries: list[Entry] = []
    for steps in args.steps:
        request = Request(prompts, steps, args.guidance, args.seed)
        measured = compare(pipe, request, args.methods, args.calls, announcer(pipe))
        print("\n".join(_line(table, entry) for entry in measured), flush=True)
        entries += measured
    warn_if_busy(max(entry.slowest / entry.seconds for entry in entries))
    if args.json is not None:
        document = {
            "prompts": prompts,
            "guidance": args.guidance,
            "seed": args.seed,
            "dtype": args.dtype,
            "device": str(pipe.device),
            "threads": torch.get_num_threads(),
            "calls": args.calls,
            "entries": [asdict(entry) for entry in entries],
            "environment": environment(),
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")
        print(f"\n{args.json}")


def open_for(args: argparse.Namespace, steps: int) -> Any:
    """The pipeline the arguments name, known to be one that compiles, takes prompts and can make so many steps."""
    silence()
    pipe = open_pipeline(args.model, args.device, args.dtype, ddim=args.ddim)
    try:
        compile(pipe)
    except UnsupportedScheduler as error:
        raise UnsupportedScheduler(f"{error} On the command line: --ddim.") from error
    if "prompt" not in inspect.signature(type(pipe).__call__).parameters:
        raise InvalidArgument(f"{type(pipe).__name__} takes no prompt. Give a text-to-image pipeline.")
    trained = int(pipe.scheduler.config.num_train_timesteps)
    if steps > trained:
        raise InvalidArgument(
            f"{steps} steps are too many. The model was trained with {trained}. Ask for at most these."
        )
    return pipe


def prompts_for(args: argparse.Namespace) -> tuple[str, ...]:
    """The prompts given, or those of the bundled pipeline."""
    if args.prompt:
        return tuple(args.prompt)
    if args.model in zoo.names():
        return tuple(zoo.prompts(args.model))
    raise InvalidArgument(f"It is not known what {args.model} can draw. Say it with --prompt, once for every image.")


def announcer(pipe: Any) -> Announce:
    """Labels the pipeline's own progress bar, which is shown on a terminal only."""
    hidden = not sys.stderr.isatty()

    def announce(text: str) -> None:
        pipe.set_progress_bar_config(desc=text, leave=False, disable=hidden)

    return announce


def warn_if_busy(spread: float) -> None:
    """Say so where the seconds of equal calls lie too far apart to be believed."""
    if spread > BELIEVABLE_SPREAD:
        print(
            f"\nMind: equal calls differed by up to {spread:.1f} times in their seconds. Something else kept this "
            "machine busy;\nmeasure again when it is idle."
        )


def about_run(args: argparse.Namespace, images: int, pipe: Any) -> str:
    """What is sampled, and on what."""
    device, threads = pipe.device, torch.get_num_threads()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {counted(threads, 'thread')}"
    what = f"{counted(images, 'image')}, guidance {args.guidance:g}, seed {args.seed} for the first"
    return f"{what}, {args.dtype} on {where}"


def counted(number: int, thing: str) -> str:
    """1 image, 2 images."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def grey(difference: Difference) -> list[str]:
    """The cells below `GREY`."""
    return [small(value) for value in (difference.mean, difference.p95, difference.max)]


def about_difference(images: int) -> str:
    """What the columns of `GREY` hold."""
    return (
        "mean, p95, max: difference to the stock pipeline with the same seeds, in grey levels. Of each image the mean\n"
        "absolute difference, decoded and not yet rounded to 8 bits; then mean, 95th percentile and maximum over "
        f"{counted(images, 'image')}."
    )


def _line(table: Table, entry: Entry) -> str:
    blocks, iterations = entry.blocks or None, entry.iterations or None
    counts = entry.waves, entry.rows, entry.peak_rows
    times = f"{entry.ratio:.2f}", f"{entry.seconds:.3f}"
    return table.line(entry.steps, entry.method, blocks, iterations, *counts, *grey(entry.difference), *times)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `compile`."""
    return {
        "method": args.method,
        "tolerance": args.tolerance,
        "exact": args.exact,
        "num_blocks": args.blocks,
        "max_iterations": args.iterations,
        "coarse_solver": args.coarse_solver,
        "in_flight": args.in_flight,
        "max_rows": args.max_rows,
    }


def _slug(prompt: str) -> str:
    """A file name from a prompt."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "image"
