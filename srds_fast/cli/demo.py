"""`srds-fast demo`: SRDS beside the sequential loop, iteration by iteration."""

from __future__ import annotations

import argparse
from pathlib import Path

from .commands import COUNTS, GREY, about_difference, about_run, announcer, grey, open_for, prompts_for, warn_if_busy
from .comparison import Request, Seconds, verdict
from .refining import TIMED_CALLS, Convergence, converge
from .sheet import convergence_sheet
from .table import Table

WHEN_FASTER = """\
When is SRDS faster? It makes fewer waves, but a wave holds more rows, and there are more rows in all. On a CPU, or on a
GPU that one row keeps busy, rows cost what they cost and the sequential loop wins. SRDS can only win where a wide
batch costs little more than one row, as a small network on a large GPU should; this run is the measure."""


def demo(args: argparse.Namespace) -> None:
    """Print how SRDS converges to the stock pipeline's images, and draw it."""
    pipe = open_for(args, args.steps)
    request = Request(prompts_for(args), args.steps, args.guidance, args.seed)
    settings = {
        "num_blocks": args.blocks,
        "coarse_solver": args.coarse_solver,
        "in_flight": args.in_flight,
        "max_rows": args.max_rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{args.steps} steps, {about_run(args, len(request.prompts), pipe)}.", flush=True)
    result = converge(pipe, request, args.iterations, settings, announcer(pipe))
    _print_iterations(result)
    _print_seconds(result)
    _draw(result, args.out)


def _print_iterations(result: Convergence) -> None:
    plan, report = result.plan, result.final.report
    print(
        f"SRDS: {plan.num_blocks} blocks, coarse solver {plan.coarse_solver}.\n"
        f"{about_difference(len(result.request.prompts))}\n"
    )
    table = Table([("iteration", -10), *COUNTS, *GREY])
    print(table.heading())
    for stage in result.stages:
        spent = stage.spent
        line = table.line(stage.iteration, spent.waves, spent.rows, spent.peak_rows, *grey(stage.difference))
        stops = stage.iteration == report.iterations
        print(f"{line}  <- default tolerance stops here" if stops else line)
    if report.iterations > result.stages[-1].iteration:
        print(f"\nThe default tolerance stops after {report.iterations} iterations; see them all with --iterations.")


def _print_seconds(result: Convergence) -> None:
    table = Table([("final", -10), *COUNTS, *GREY, ("loop s", 11), ("call s", 11)])
    print(f"\n{table.heading()}")
    for name, done in (("srds", result.final), ("sequential", result.sequential)):
        counts = done.report.waves, done.report.rows, done.report.peak_rows
        print(table.line(name, *counts, *grey(done.difference), _span(done.loop), _span(done.call)))
    print(table.line("stock", *[None] * 7, _span(result.stock)))
    print(
        "loop s: the denoising loop; call s: the whole call, with prompt encoding and decoding. Fastest and slowest of "
        f"{TIMED_CALLS}\ncalls, in turn, after an untimed one.\n\n"
        f"This run: the SRDS loop was {verdict(result.final.loop, result.sequential.loop)} the sequential loop, and "
        f"the\nwhole call {verdict(result.final.call, result.stock)} the stock pipeline's.\n{WHEN_FASTER}"
    )
    warn_if_busy(max(result.final.call.spread, result.sequential.call.spread, result.stock.spread))


def _span(seconds: Seconds) -> str:
    return f"{seconds.fastest:.2f}-{seconds.slowest:.2f}"


def _draw(result: Convergence, out: Path) -> None:
    sheet, plot = out / "contact-sheet.png", out / "convergence.png"
    convergence_sheet(result).save(sheet)
    print(f"\ncontact sheet     {sheet}")
    try:
        from .plot import convergence_plot

        convergence_plot(result, plot)
        print(f"convergence plot  {plot}")
    except ImportError:
        print("convergence plot  not drawn, matplotlib is not installed: pip install 'srds-fast[plot]'")
