"""Measuring calls: how far from the sequential image, in how many seconds. Nothing is printed here.

Every difference is to the output of the stock pipeline with the same seeds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pipelines.compile import compile
from ..planner.plan import Plan
from ..solvers.program import Spent
from ..solvers.registry import DEFAULT, SEQUENTIAL

TIMED_CALLS = 2


@dataclass(frozen=True)
class Request:
    """What is asked of every pipeline alike.

    Attributes:
        guidance: guidance scale; None leaves it to the pipeline.
        seed: image i starts from a CPU generator seeded with `seed + i`.
    """

    prompts: tuple[str, ...]
    steps: int
    guidance: float | None
    seed: int = 0
    images_per_prompt: int = 1
    negative_prompt: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of a pipeline call, with new generators; what is left to the pipeline is not among them."""
        count = len(self.prompts)
        seeds = range(self.seed, self.seed + count * self.images_per_prompt)
        asked = {
            "prompt": list(self.prompts),
            "num_inference_steps": self.steps,
            # on the CPU: then the noise is the same on every device and for every batch size
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            "guidance_scale": self.guidance,
            "num_images_per_prompt": self.images_per_prompt if self.images_per_prompt > 1 else None,
            "negative_prompt": None if self.negative_prompt is None else [self.negative_prompt] * count,
        }
        return {name: value for name, value in asked.items() if value is not None}


def grey_levels(images: Tensor, reference: Tensor) -> dict[str, float]:
    """Difference of images [n, channels, height, width] in [0, 1] before they are rounded to 8 bits.

    Returns:
        "mean", "p95" and "max" over the images of each image's mean absolute difference, in grey levels.
    """
    per_image = 255 * (images.double() - reference.double()).abs().flatten(1).mean(1)
    return {"mean": float(per_image.mean()), "p95": float(per_image.quantile(0.95)), "max": float(per_image.max())}


@dataclass
class Calls:
    """Equal calls of one pipeline, stock or compiled.

    Attributes:
        images: [n, channels, height, width] in [0, 1], on the CPU; the same in every call.
        seconds: of each whole call, prompts encoded and images decoded.
        loop_seconds: of the denoising loop of each call; empty for the stock pipeline.
        report: of the last call; None for the stock pipeline.
    """

    pipe: Any
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: list[float] = field(default_factory=list)
    loop_seconds: list[float] = field(default_factory=list)
    report: Any = None

    def add(self, request: Request) -> Calls:
        """Make one more call."""
        started = time.perf_counter()
        self.images = self.pipe(**request.arguments(), output_type="pt").images.cpu()  # the copy waits for the device
        self.seconds.append(time.perf_counter() - started)
        self.report = getattr(self.pipe, "report", None)
        if self.report is not None:
            self.loop_seconds.append(self.report.seconds)
        return self


def in_turn(stock: Any, pipes: Mapping[str, Any], request: Request, rounds: int) -> list[Calls]:
    """Call every pipeline once a round, so that a busy minute of the machine disturbs all of them alike.

    Args:
        stock: the pipeline they are made of, or that is one of them.
        pipes: by the name that the progress bar shows.
    """
    calls = {name: Calls(pipe) for name, pipe in pipes.items()}
    for _ in range(rounds):
        for name, done in calls.items():
            label(stock, name)
            done.add(request)
    return list(calls.values())


def label(pipe: Any, text: str) -> None:
    """Label the progress bar of a pipeline, and of all compiled from it. It is shown on a terminal only."""
    pipe.set_progress_bar_config(desc=text, leave=False, disable=not sys.stderr.isatty())


def verdict(seconds: Sequence[float], other: Sequence[float]) -> str:
    """How `seconds` compare with `other`, in words. Where the times overlap neither is called faster."""
    ratio = min(seconds) / min(other)
    if max(seconds) < min(other):
        return f"{1 / ratio:.2f} times faster than"
    if min(seconds) > max(other):
        return f"{ratio:.2f} times slower than"
    return "neither clearly faster nor slower than"


class Stage(NamedTuple):
    """The images [n, channels, height, width] in [0, 1] after one iteration."""

    iteration: int
    spent: Spent
    images: Tensor


class Convergence(NamedTuple):
    """SRDS on the way to the sequential images.

    Attributes:
        plan: what `final` was run with; it may stop earlier.
        stages: iteration 0 and later, run on beyond the tolerance.
        sequential: the compiled pipeline, method "sequential".
        final: the compiled pipeline, method "srds", stopped by the default tolerance.
    """

    request: Request
    plan: Plan
    stages: list[Stage]
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
    stages = []
    for look in patient.stream(**request.arguments()):
        with torch.no_grad():
            images = pipe.vae.decode(look.latents / pipe.vae.config.scaling_factor).sample
        pixels = pipe.image_processor.postprocess(images, output_type="pt").cpu()
        stages.append(Stage(look.iteration, program.spent(look.iteration), pixels))
    pipes = {"stock pipeline": pipe, SEQUENTIAL: compile(pipe, method=SEQUENTIAL), "SRDS": fast}
    return Convergence(request, plan, stages, *in_turn(pipe, pipes, request, TIMED_CALLS))
