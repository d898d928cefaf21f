"""One image, as a user makes it: the compiled pipeline against the pipeline's own call, in turn."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from ..pipelines.compile import compile
from ..solvers.registry import SEQUENTIAL
from ..telemetry.report import STOCK_LOOP, Report
from ..words import counted
from .checks import settings_of
from .convergence import Look, streamed
from .measure import Calls, Request, grey_levels
from .output import about, progress, seconds_of, show_table, small, warn_if_busy
from .pictures import Column, Point, contact_sheet, convergence_plot, draw

PAIRS = 3


@dataclass(frozen=True)
class ImagePart:
    """What was measured; see `demo.Part`.

    Attributes:
        seconds: of a warmed-up call of ours, the median.
        stock_seconds: of the pipeline's own call, the median.
        ratio: the median over the pairs of their seconds over ours.
        difference: to the pipeline's own image, in grey levels, of the image that is furthest off.
        warmup_seconds: of `warmup`, which also chooses the plan.
        report: of the last call of ours.
    """

    seconds: float
    stock_seconds: float
    ratio: float
    difference: float
    warmup_seconds: float
    report: Report

    @property
    def wins(self) -> bool:
        """Whether calls are faster than the pipeline's own, and not because these are what runs."""
        return self.report.method != STOCK_LOOP and self.ratio > 1 and self.seconds < self.stock_seconds

    @property
    def pays_back(self) -> int | None:
        """After how many calls the warm-up has cost less time than was saved; None: never."""
        return math.ceil(self.warmup_seconds / (self.stock_seconds - self.seconds)) if self.wins else None

    def __str__(self) -> str:
        """What was gained, or that nothing was."""
        ours, stock = seconds_of(self.seconds), seconds_of(self.stock_seconds)
        if not self.wins:
            kept = "the pipeline's own loop" if self.report.method == STOCK_LOOP else f"{self.report.method} loop"
            return (
                f"Image: nothing is faster here than the pipeline's own call ({stock}). auto keeps {kept}: {ours}, "
                f"ratio {self.ratio:.2f}."
            )
        return (
            f"Image: {ours} instead of {stock}: {self.ratio:.2f} times faster than the pipeline's own call (median of "
            f"{counted(PAIRS, 'pair')}), at most {small(self.difference)} grey levels from its image. The warm-up of "
            f"{seconds_of(self.warmup_seconds)} pays back after {counted(self.pays_back or 0, 'call')}."
        )


def image(args: argparse.Namespace, pipe: Any, request: Request) -> ImagePart:
    """Warm up, time calls in turn, stream the same call, and draw both."""
    print(f"{request.steps} steps, {about(args, pipe, request.prompts, request.guidance)}.", flush=True)
    fast = compile(pipe, **settings_of(args, request.steps), parallel="auto")
    with progress(3 + 2 * PAIRS) as told:
        told("warm-up of the pipeline's own call")
        Calls(pipe).add(replace(request, steps=min(2, request.steps)))
        told("warm-up: times every plan")
        started = time.perf_counter()
        fast.warmup(**request.arguments())
        warmup_seconds = time.perf_counter() - started
        stock, ours, furthest = Calls(pipe), Calls(fast), 0.0
        for number in reversed(range(PAIRS)):  # the last pair has the request's own seed, which the pictures show
            each = replace(request, seed=request.seed + number)
            for name, calls in (("the pipeline itself", stock), ("srds_fast", ours)):
                told(name)
                calls.add(each)
            furthest = max(furthest, grey_levels(ours.images, stock.images)["max"])
        told("previews")
        looks = streamed(fast, request)
    ratio = median(theirs / own for theirs, own in zip(stock.seconds, ours.seconds, strict=True))
    found = ImagePart(median(ours.seconds), median(stock.seconds), ratio, furthest, warmup_seconds, ours.report)
    print(f"auto runs {ours.report.method}: {ours.report.plan_reason or 'as it was asked to'}")
    show_table(
        [
            {"call": name, "median s": seconds_of(median(calls.seconds)), "fastest": seconds_of(min(calls.seconds))}
            | {"slowest": seconds_of(max(calls.seconds))}
            for name, calls in (("the pipeline itself", stock), ("srds_fast", ours))
        ],
        text=["call"],
    )
    warn_if_busy([stock.seconds, ours.seconds])
    draw(args.out, _sheet(request, found, looks, ours, stock), _plotted(found, looks, stock, found.report.method))
    return found


def _sheet(request: Request, found: ImagePart, looks: Sequence[Look], ours: Calls, stock: Calls) -> Any:
    columns = [
        Column("first preview" if not number else f"preview {number + 1}", seconds_of(look.seconds), look.images)
        for number, look in enumerate(looks[:-1])
    ]
    columns += [
        Column("final", seconds_of(found.seconds), ours.images, coloured=True),
        Column(SEQUENTIAL, seconds_of(found.stock_seconds), stock.images),
    ]
    return contact_sheet(request.prompts, columns, ours.images, stock.images)


def _plotted(found: ImagePart, looks: Sequence[Look], stock: Calls, previewed: str) -> Any:
    """Draws the convergence plot at a path. previewed: the method that made the previews."""

    def plot(path: Any) -> None:
        points = [
            Point(look.seconds, grey_levels(look.images, stock.images), f"iteration {look.iteration}") for look in looks
        ]
        convergence_plot(
            points,
            marks={"the pipeline's own call": found.stock_seconds},
            x="seconds since the beginning of the call",
            title=f"{found.report.num_inference_steps} steps, previews by {previewed}",
            path=path,
        )

    return plot
