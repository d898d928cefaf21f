"""How a method comes to the sequential images, iteration by iteration. Nothing is printed here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidArgument
from ..pipelines.compile import Compiled, compile
from ..planner.plan import Plan
from ..sampling.stream import Refinement
from ..solvers.program import Spent
from ..solvers.registry import BY_NAME, SEQUENTIAL, options_of
from .measure import Calls, Request, Told, grey_levels, in_turn

TIMED_CALLS = 2
# how often `converge` tells what begins
TIMES_TOLD = 2 + 3 * TIMED_CALLS


class Look(NamedTuple):
    """A preview of a stream.

    Attributes:
        iteration: its number.
        seconds: from the beginning of the call until its latents were there.
        images: [n, channels, height, width] in [0, 1], on the CPU.
    """

    iteration: int
    seconds: float
    images: Tensor


class Stage(NamedTuple):
    """A preview, and the waves and rows until then."""

    look: Look
    spent: Spent


class Convergence(NamedTuple):
    """A method on the way to the sequential images.

    Attributes:
        plan: what `final` was run with; it may stop earlier.
        stages: its iterations, run on beyond the tolerance.
        stock: the pipeline itself.
        sequential: the compiled pipeline, method "sequential".
        final: the compiled pipeline with the method, stopped by the default tolerance.
    """

    request: Request
    plan: Plan
    stages: list[Stage]
    stock: Calls
    sequential: Calls
    final: Calls

    def difference(self, images: Tensor) -> dict[str, float]:
        """`grey_levels` to the images of the pipeline's own call."""
        return grey_levels(images, self.stock.images)


def streamed(fast: Compiled[Any], request: Request) -> list[Look]:
    """The previews of one call. They are decoded after its end, so that decoding disturbs no time."""
    started, seen = time.perf_counter(), []
    for refinement in fast.stream(**request.arguments()):
        seen.append((refinement, time.perf_counter() - started))
    return [Look(each.iteration, seconds, _pixels(fast, each)) for each, seconds in seen]


@torch.no_grad()
def _pixels(pipe: Any, refinement: Refinement) -> Tensor:
    """Its images [n, channels, height, width] in [0, 1].

    They are not rounded to 8 bits where the pipeline gives its latents to the VAE as they are.
    """
    vae: Any = getattr(pipe, "vae", None)
    config, latents = getattr(vae, "config", {}), refinement.latents
    plain = config.get("shift_factor") is None and config.get("latents_mean") is None and latents.dim() == 4
    if plain and config.get("latent_channels") == latents.shape[1] and config.get("scaling_factor"):
        images = vae.decode(latents / config["scaling_factor"]).sample
        found: Tensor = pipe.image_processor.postprocess(images, output_type="pt").cpu()
        return found
    images = [torch.from_numpy(np.array(image.convert("RGB"))) for image in refinement.images]
    return torch.stack(images).permute(0, 3, 1, 2) / 255


def check_walk(method: str) -> None:
    """Raise InvalidArgument if a method, as --method names it, has no iterations to show."""
    if method in BY_NAME and not _shows_iterations(method):
        known = ", ".join(name for name in BY_NAME if _shows_iterations(name))
        raise InvalidArgument(f"{method} has no whole image before its end. Show the iterations of one of {known}.")


def _shows_iterations(name: str) -> bool:
    options = options_of(name)
    return options is not None and name != SEQUENTIAL and options.shows_iterations


def converge(pipe: Any, request: Request, num_iterations: int, settings: Mapping[str, Any], told: Told) -> Convergence:
    """Sample with the pipeline itself, with our sequential loop, and with a method, iteration by iteration.

    Every timed call comes after an untimed run of its kind and decodes only its result.

    Args:
        num_iterations: to look at, whatever the tolerance would say.
        settings: of `compile`, with the method.
        told: what begins next, `TIMES_TOLD` times.
    """
    fast = compile(pipe, **settings, parallel="auto")
    plan = fast.plan_for(**request.arguments())
    told("warm-up")
    Calls(pipe).add(replace(request, steps=min(2, request.steps)))
    told("iteration by iteration")
    shown = min(num_iterations, plan.max_iterations)
    endless = {name: value for name, value in settings.items() if name != "exact"}
    patient = compile(pipe, **{**endless, "tolerance": 0.0, "max_iterations": shown}, parallel="auto")
    program = plan.program()
    # also the warm-up of the method
    stages = [Stage(look, program.spent(look.iteration)) for look in streamed(patient, request)]
    pipes = {
        "the pipeline itself": pipe,
        SEQUENTIAL: compile(pipe, method=SEQUENTIAL, parallel="auto"),
        plan.method: fast,
    }
    return Convergence(request, plan, stages, *in_turn(pipes, request, TIMED_CALLS, told))
