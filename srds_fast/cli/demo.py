"""`srds-fast demo`: how SRDS comes to the sequential images, iteration by iteration."""

from __future__ import annotations

import argparse
from typing import Any

from torch import Tensor

from ..files import check_file, new_file
from ..solvers.registry import DEFAULT, SEQUENTIAL
from .loading import open_for, prompts_for, settings_of
from .measure import TIMED_CALLS, Calls, Convergence, Request, converge, verdict
from .output import about, counted, show_table, small, warn_if_busy
from .pictures import contact_sheet, convergence_plot

WHEN_FASTER = """\
When is SRDS faster? It makes fewer waves than the sequential loop, but evaluates more rows, many in one wave. On a CPU,
or on a GPU that one row keeps busy, time grows with the rows and the sequential loop wins. SRDS can only win where a
wide batch costs little more than one row, as a small network on a large GPU should. This run measured it."""


def run(args: argparse.Namespace) -> None:
    """Print how SRDS converges to the images of the stock pipeline, and draw it."""
    pipe = open_for(args, args.steps)
    request = Request(prompts_for(args), args.steps, args.guidance, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    sheet, plot = args.out / "contact-sheet.png", args.out / "convergence.png"
    for path in (sheet, plot):
        check_file(path)
    print(f"{args.steps} steps, {about(args, pipe, request.prompts)}", flush=True)
    result = converge(pipe, request, args.shown, settings_of(args))
    _print(result)
    with new_file(sheet) as unfinished:
        contact_sheet(result).save(unfinished)
    print(f"\ncontact sheet     {sheet}")
    try:
        convergence_plot(result, plot)
        print(f"convergence plot  {plot}")
    except ImportError:
        print("convergence plot  not drawn, matplotlib is not installed: pip install 'srds-fast[plot]'")


def _print(result: Convergence) -> None:
    plan, final, sequential, stock = result.plan, result.final, result.sequential, result.stock
    stop = final.report.iterations

    def cells(spent: Any, images: Tensor) -> dict[str, object]:
        counts = {"waves": spent.waves, "rows": spent.rows, "peak rows": spent.peak_rows}
        return {**counts, **{name: small(value) for name, value in result.difference(images).items()}}

    print(f"SRDS: {plan.num_blocks} blocks, coarse solver {plan.coarse_solver}.")
    here = "<- default tolerance stops here"
    iterations = [
        {"iteration": number, **cells(spent, images), "": here if number == stop else ""}
        for number, spent, images in result.stages
    ]
    show_table(iterations, text=["iteration", ""])
    if stop > result.stages[-1].iteration:
        print(f"\nThe default tolerance stops after {stop} iterations; see them all with --iterations.")
    rows: list[dict[str, object]] = [
        {"final": name, **cells(done.report, done.images), **_seconds(done)}
        for name, done in ((DEFAULT, final), (SEQUENTIAL, sequential))
    ]
    rows.append({**dict.fromkeys(rows[0]), "final": "stock", **_seconds(stock)})
    show_table(rows, text=["final"])
    print(
        "loop s: the denoising loop. call s: the whole call, with prompt encoding and decoding. Both: fastest and "
        f"slowest of\n{counted(TIMED_CALLS, 'call')}, in turn, after an untimed one.\n\n"
        f"This run: the SRDS loop was {verdict(final.loop_seconds, sequential.loop_seconds)} the sequential loop, "
        f"and the\nwhole call {verdict(final.seconds, stock.seconds)} that of the stock pipeline.\n{WHEN_FASTER}"
    )
    warn_if_busy(done.seconds for done in (final, sequential, stock))


def _seconds(done: Calls) -> dict[str, object]:
    both = {"loop s": done.loop_seconds, "call s": done.seconds}
    return {name: f"{min(times):.2f}-{max(times):.2f}" if times else None for name, times in both.items()}
