"""SRDS on the way to the sequential images. Nothing is printed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pipelines.compile import compile
from ..planner.plan import Plan
from ..solvers.program import Spent
from ..solvers.registry import DEFAULT, SEQUENTIAL
from .measure import Calls, Request, grey_levels, in_turn, label

TIMED_CALLS = 2


class Stage(NamedTuple):
    """The images [n, channels, height, width] in [0, 1] after one iteration."""

    iteration: int
    spent: Spent
    images: Tensor


class Convergence(NamedTuple):
    """
    Attributes:
        plan: what `final` was run with; it may stop earlier.
        stages: iteration 0 and later, run on beyond the tolerance.
        sequential: the compiled pipeline, method "sequential".
        final: the compiled pipeline, method "srds", stopped by the default tolerance.
    """

    request: Request
    plan: Plan
    stages: tuple[Stage, ...]
    stock: Calls
    sequential: Calls
    final: Calls

    def difference(self, images: Tensor) -> dict[str, float]:
        """`grey_levels` to the images of the stock pipeline."""
        return grey_levels(images, self.stock.images)


def converge(pipe: Any, request: Request, num_iterations: int, settings: Mapping[str, Any]) -> Convergence:
    """Sample with the stock pipeline, with the compiled one sequentially, and with SRDS, iteration by iteration.

    Every timed call comes after an untimed run of its kind and decodes only its result.

    Args:
        num_iterations: to look at, whatever the tolerance would say.
        settings: of `compile`, for SRDS.
    """
    fast = compile(pipe, **settings, method=DEFAULT)
    plan = fast.plan_for(**request.arguments())
    label(pipe, "warm-up")
    Calls(pipe).add(replace(request, steps=min(2, request.steps)))
    label(pipe, "SRDS, iteration by iteration")
    shown = min(num_iterations, plan.num_blocks)
    patient = compile(pipe, **settings, method=DEFAULT, tolerance=0.0, max_iterations=shown)
    program = plan.program()
    # also the warm-up of SRDS
    stages = tuple(
        Stage(look.iteration, program.spent(look.iteration), _decoded(pipe, look.latents))
        for look in patient.stream(**request.arguments())
    )
    pipes = {"stock pipeline": pipe, SEQUENTIAL: compile(pipe, method=SEQUENTIAL), "SRDS": fast}
    return Convergence(request, plan, stages, *in_turn(pipe, pipes, request, TIMED_CALLS))


def _decoded(pipe: Any, latents: Tensor) -> Tensor:
    with torch.no_grad():
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    pixels: Tensor = pipe.image_processor.postprocess(images, output_type="pt").cpu()
    return pixels
