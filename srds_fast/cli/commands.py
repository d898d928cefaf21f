"""`srds-fast demo`, `generate` and `compare`: what they do and print."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..environment import environment
from ..errors import InvalidArgument
from ..pipelines.compile import compile
from ..solvers.registry import DEFAULT, SEQUENTIAL
from . import measure
from .loading import open_for, prompts_for, settings_of
from .measure import METHODS, TIMED_CALLS, Convergence, Request, spread, verdict
from .output import announcer, counted, counts, grey, show_table, warn_if_busy
from .sheet import convergence_sheet

WHEN_FASTER = """\
When is SRDS faster? It makes fewer waves than the sequential loop, but evaluates more rows, many in one wave. On a CPU,
or on a GPU that one row keeps busy, time grows with the rows and the sequential loop wins. SRDS can only win where a
wide batch costs little more than one row, as a small network on a large GPU should. This run measured it."""


def demo(args: argparse.Namespace) -> None:
    """Print how SRDS converges to the images of the stock pipeline, and draw it."""
    pipe = open_for(args, args.steps)
    request = Request(prompts_for(args), args.steps, args.guidance, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{args.steps} steps, {_about(args, pipe, request.prompts)}", flush=True)
    result = measure.converge(pipe, request, args.shown, settings_of(args), announcer(pipe))
    _print_iterations(result)
    _print_seconds(result)
    _draw(result, args.out)


def _about(args: argparse.Namespace, pipe: Any, prompts: Sequence[str]) -> str:
    """What is sampled, on what, and how differences are measured."""
    images, device = counted(len(prompts), "image"), pipe.device
    where = f"{device}, {counted(torch.get_num_threads(), 'thread')}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return (
        f"{images}, guidance {args.guidance:g}, seed {args.seed} for the first, {args.dtype} on {where}.\n"
        "mean, p95, max: difference to the stock pipeline with the same seeds, in grey levels. Each image gives one\n"
        "value, its mean absolute difference before rounding to 8 bits; the columns are mean, 95th percentile and\n"
        f"maximum over {images}."
    )


def _print_iterations(result: Convergence) -> None:
    plan, stop = result.plan, result.final.report.iterations
    print(f"SRDS: {plan.num_blocks} blocks, coarse solver {plan.coarse_solver}.")
    rows = [
        {
            "iteration": stage.iteration,
            **counts(stage.spent),
            **grey(result.difference(stage.images)),
            "": "<- default tolerance stops here" if stage.iteration == stop else "",
        }
        for stage in result.stages
    ]
    show_table(rows, text=["iteration", ""])
    if stop > result.stages[-1].iteration:
        print(f"\nThe default tolerance stops after {stop} iterations; see them all with --iterations.")


def _print_seconds(result: Convergence) -> None:
    final, sequential, stock = result.final, result.sequential, result.stock
    rows: list[dict[str, object]] = [
        {
            "final": name,
            **counts(done.report),
            **grey(result.difference(done.images)),
            "loop s": _span(done.loop_seconds),
            "call s": _span(done.seconds),
        }
        for name, done in ((DEFAULT, final), (SEQUENTIAL, sequential))
    ]
    rows.append({**dict.fromkeys(rows[0]), "final": "stock", "call s": _span(stock.seconds)})
    show_table(rows, text=["final"])
    print(
        "loop s: the denoising loop. call s: the whole call, with prompt encoding and decoding. Both: fastest and "
        f"slowest of\n{counted(TIMED_CALLS, 'call')}, in turn, after an untimed one.\n\n"
        f"This run: the SRDS loop was {verdict(final.loop_seconds, sequential.loop_seconds)} the sequential loop, "
        f"and the\nwhole call {verdict(final.seconds, stock.seconds)} that of the stock pipeline.\n{WHEN_FASTER}"
    )
    warn_if_busy(max(spread(done.seconds) for done in (final, sequential, stock)))


def _span(seconds: Sequence[float]) -> str:
    return f"{min(seconds):.2f}-{max(seconds):.2f}"


def _draw(result: Convergence, out: Path) -> None:
    sheet, plot = out / "contact-sheet.png", out / "convergence.png"
    convergence_sheet(result).save(sheet)
    print(f"\ncontact sheet     {sheet}")
    try:
        from .plots import convergence_plot

        convergence_plot(result, plot)
        print(f"convergence plot  {plot}")
    except ImportError:
        print("convergence plot  not drawn, matplotlib is not installed: pip install 'srds-fast[plot]'")


def generate(args: argparse.Namespace) -> None:
    """Write images as PNG."""
    pipe = open_for(args, args.steps)
    fast = compile(pipe, **settings_of(args))
    request = Request(
        tuple(args.prompts), args.steps, args.guidance, args.seed, args.images_per_prompt, args.negative_prompt
    )
    args.out.mkdir(parents=True, exist_ok=True)
    announcer(pipe)("generate")
    for number, image in enumerate(fast(**request.arguments()).images):
        slug = re.sub(r"\W+", "-", args.prompts[number // args.images_per_prompt].lower()).strip("-")[:60] or "image"
        path = args.out / f"{slug}-seed{args.seed + number}.png"
        image.save(path)
        print(path)
    report = fast.report
    summary = f"{report.method}: {report.waves} waves for {report.num_inference_steps} steps, {report.seconds:.2f} s"
    print(f"\n{report if args.show_report else summary}")


def compare(args: argparse.Namespace) -> None:
    """Print a table for each step count, a row for each method, and write all of them as JSON if asked."""
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        raise InvalidArgument(f"There is no method {unknown[0]!r}. Known are {', '.join(METHODS)}.")
    pipe = open_for(args, max(args.steps))
    prompts = prompts_for(args)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"{_about(args, pipe, prompts)}\n"
        "iterations: of the image that needed most. seconds: of the denoising loop, the fastest of "
        f"{counted(args.calls, 'call')}, in turn.\n"
        "ratio: these seconds divided by those of sequential; below 1 is faster.\n"
    )
    print("\n".join(f"  {name:<12}{METHODS[name]}" for name in args.methods), flush=True)
    entries: list[dict[str, Any]] = []
    for steps in args.steps:
        request = Request(prompts, steps, args.guidance, args.seed)
        measured = measure.compare(pipe, request, args.methods, args.calls, announcer(pipe))
        show_table([_cells(entry) for entry in measured], text=["method"])
        entries += measured
    warn_if_busy(max(entry["slowest"] / entry["seconds"] for entry in entries))
    if args.json is not None:
        document = {
            "prompts": prompts,
            "guidance": args.guidance,
            "seed": args.seed,
            "dtype": args.dtype,
            "device": str(pipe.device),
            "threads": torch.get_num_threads(),
            "calls": args.calls,
            "entries": entries,
            "environment": environment(),
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")
        print(f"\n{args.json}")


def _cells(entry: dict[str, Any]) -> dict[str, object]:
    shown = ("steps", "method", "blocks", "iterations", "waves", "rows", "peak_rows")
    return {
        **{name.replace("_", " "): entry[name] or None for name in shown},
        **grey(entry["difference"]),
        "ratio": f"{entry['ratio']:.2f}",
        "seconds": f"{entry['seconds']:.3f}",
    }
