"""The demo of one method: how it comes to the sequential images, iteration by iteration."""

from __future__ import annotations

import argparse
from typing import Any

from torch import Tensor

from ..solvers.registry import SEQUENTIAL
from ..words import counted
from .convergence import TIMED_CALLS, TIMES_TOLD, Convergence, converge
from .measure import Calls, Request, verdict
from .output import about, about_differences, progress, seconds_of, show_table, small, warn_if_busy
from .pictures import Column, Point, contact_sheet, convergence_plot, draw

ITERATIONS = 4
WHEN_FASTER = """\
When is it faster? A parallel method makes fewer waves than the sequential loop, but evaluates more rows, many in one
wave. On a CPU, or on a GPU that one row keeps busy, time grows with the rows. It wins where a wide batch costs little
more than one row. This run measured it; `srds-fast demo` without --method runs what is the fastest here."""


def walk(args: argparse.Namespace, pipe: Any, request: Request, settings: dict[str, Any]) -> dict[str, Any]:
    """Print how a method converges to the images of the pipeline itself, and draw it. Returns it ready for JSON."""
    print(f"{request.steps} steps, {about(args, pipe, request.prompts, request.guidance)}.")
    print(about_differences(request.prompts), flush=True)
    shown = ITERATIONS if args.shown is None else args.shown
    with progress(TIMES_TOLD) as told:
        result = converge(pipe, request, shown, settings, told)
    _print(result)
    draw(args.out, _sheet(result), lambda path: _plot(result, path))
    stages = [
        {"iteration": look.iteration, "seconds": look.seconds, "waves": spent.waves, "rows": spent.rows}
        | {"difference": result.difference(look.images)}
        for look, spent in result.stages
    ]
    calls = {"final": result.final, SEQUENTIAL: result.sequential, "stock": result.stock}
    seconds = {name: {"seconds": done.seconds, "loop_seconds": done.loop_seconds} for name, done in calls.items()}
    return {"plan": result.plan.to_dict(), "iterations": stages, "calls": seconds, "out": str(args.out)}


def _print(result: Convergence) -> None:
    plan, final, sequential, stock = result.plan, result.final, result.sequential, result.stock
    stop = final.report.iterations

    def cells(spent: Any, images: Tensor) -> dict[str, object]:
        counts = {"waves": spent.waves, "rows": spent.rows, "peak rows": spent.peak_rows}
        return {**counts, **{name: small(value) for name, value in result.difference(images).items()}}

    print(f"{', '.join([plan.method, *plan.options.details()])}.")
    here = "<- default tolerance stops here"
    iterations = [
        {"iteration": look.iteration, **cells(spent, look.images), "": here if look.iteration == stop else ""}
        for look, spent in result.stages
    ]
    show_table(iterations, text=["iteration", ""])
    if stop > result.stages[-1].look.iteration:
        print(f"\nThe default tolerance stops after {stop} iterations; see them all with --iterations.")
    rows: list[dict[str, object]] = [
        {"final": name, **cells(done.report, done.images), **_seconds(done)}
        for name, done in ((plan.method, final), (SEQUENTIAL, sequential))
    ]
    rows.append({**dict.fromkeys(rows[0]), "final": "stock", **_seconds(stock)})
    show_table(rows, text=["final"])
    print(
        "loop s: the denoising loop. call s: the whole call, with prompt encoding and decoding. Both: fastest and "
        f"slowest of\n{counted(TIMED_CALLS, 'call')}, in turn, after an untimed one. stock: the pipeline itself.\n\n"
        f"This run: the loop of {plan.method} was {verdict(final.loop_seconds, sequential.loop_seconds)} the "
        f"sequential loop, and the\nwhole call {verdict(final.seconds, stock.seconds)} that of the pipeline itself.\n"
        f"{WHEN_FASTER}"
    )
    warn_if_busy(done.seconds for done in (final, sequential, stock))


def _seconds(done: Calls) -> dict[str, object]:
    both = {"loop s": done.loop_seconds, "call s": done.seconds}
    return {name: f"{min(times):.2f}-{max(times):.2f}" if times else None for name, times in both.items()}


def _sheet(result: Convergence) -> Any:
    final, stock, stop = result.final, result.stock, result.final.report.iterations
    columns = [
        Column(f"iteration {look.iteration}", seconds_of(look.seconds), look.images, look.iteration == stop)
        for look, _ in result.stages
    ]
    columns += [
        Column("final", seconds_of(min(final.seconds)), final.images, coloured=True),
        Column(SEQUENTIAL, seconds_of(min(stock.seconds)), stock.images),
    ]
    return contact_sheet(result.request.prompts, columns, final.images, stock.images)


def _plot(result: Convergence, path: Any) -> None:
    plan, steps = result.plan, result.request.steps
    convergence_plot(
        [
            Point(spent.waves, result.difference(look.images), f"iteration {look.iteration}")
            for look, spent in result.stages
        ],
        marks={"default tolerance stops": result.final.report.waves, SEQUENTIAL: steps},
        x="waves (network calls one after another)",
        title=f"{steps} steps, {', '.join([plan.method, *plan.options.details()])}",
        path=path,
    )
