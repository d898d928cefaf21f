"""Measuring: the images after every iteration, on the way to the sequential ones. Nothing is printed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..pipelines.compile import compile
from ..planner.plan import Plan
from ..report import Report
from ..solvers.program import Spent
from .comparison import Announce, Call, Difference, Request, Seconds, call, grey_levels, loop_seconds


@dataclass(frozen=True)
class Stage:
    """The images after one iteration."""

    iteration: int
    spent: Spent
    difference: Difference
    images: Tensor


@dataclass(frozen=True)
class Result:
    """What repeated calls of one pipeline gave.

    Attributes:
        images: [n, channels, height, width] in [0, 1]; the calls give the same ones.
        difference: to the stock pipeline's images.
        call: seconds of the whole call, prompts encoded and images decoded.
        report: of the last call.
        loop: seconds of the denoising loop alone.
    """

    images: Tensor
    difference: Difference
    call: Seconds
    report: Report
    loop: Seconds


@dataclass(frozen=True)
class Convergence:
    """The iterations of SRDS on the way to the sequential images.

    Attributes:
        plan: what `final` was run with; it may stop earlier.
        stages: iteration 0 and later, run on beyond the tolerance.
        reference: images of the stock pipeline.
        stock: seconds of its call.
        sequential: the compiled pipeline, method "sequential".
        final: the compiled pipeline, method "srds", stopped by the default tolerance.
    """

    request: Request
    plan: Plan
    stages: tuple[Stage, ...]
    reference: Tensor
    stock: Seconds
    sequential: Result
    final: Result


TIMED_CALLS = 2


def converge(
    pipe: Any, request: Request, num_iterations: int, settings: Mapping[str, Any], announce: Announce = lambda _: None
) -> Convergence:
    """Sample with the stock pipeline, with the compiled one sequentially, and with SRDS, iteration by iteration.

    Every timed call comes after an untimed run of its kind, decodes only its result, and takes turns with the calls it
    is compared with, so that a busy minute of the machine meets them all.

    Args:
        pipe: a latent text-to-image pipeline.
        request: what to sample.
        num_iterations: iterations to look at, whatever the tolerance would say.
        settings: of `compile`, for SRDS.
        announce: told what runs next.
    """
    fast = compile(pipe, **settings, method="srds")
    plan = fast.plan_for(**request.arguments())
    announce("warm-up")
    call(pipe, replace(request, steps=min(2, request.steps)))

    announce("SRDS, iteration by iteration")
    shown = min(num_iterations, plan.num_blocks)
    patient = compile(pipe, **settings, method="srds", tolerance=0.0, max_iterations=shown)
    # also the warm-up of SRDS
    looks = [(look.iteration, _decoded(pipe, look.latents)) for look in patient.stream(**request.arguments())]

    pipes = {"stock pipeline": pipe, "sequential": compile(pipe, method="sequential"), "SRDS": fast}
    calls: dict[str, list[Call]] = {name: [] for name in pipes}
    for _ in range(TIMED_CALLS):
        for name, one in pipes.items():
            announce(name)
            calls[name].append(call(one, request))

    reference = calls["stock pipeline"][-1].images
    program = plan.program()
    stages = [
        Stage(iteration, program.spent(iteration), grey_levels(images, reference), images)
        for iteration, images in looks
    ]
    return Convergence(
        request=request,
        plan=plan,
        stages=tuple(stages),
        reference=reference,
        stock=Seconds([done.seconds for done in calls["stock pipeline"]]),
        sequential=_result(calls["sequential"], reference),
        final=_result(calls["SRDS"], reference),
    )


def _result(calls: list[Call], reference: Tensor) -> Result:
    images, report = calls[-1].images, calls[-1].report
    assert report is not None, "a compiled pipeline reports"
    return Result(
        images=images,
        difference=grey_levels(images, reference),
        call=Seconds([done.seconds for done in calls]),
        report=report,
        loop=loop_seconds(calls),
    )


def _decoded(pipe: Any, latents: Tensor) -> Tensor:
    with torch.no_grad():
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    pixels: Tensor = (images / 2 + 0.5).clamp(0, 1).cpu()
    return pixels
