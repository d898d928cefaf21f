"""Measuring: how far from the sequential image, after how many waves, in how many seconds. Nothing is printed here.

Every difference is to the output of the stock pipeline with the same seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..methods import SRDS
from ..pipelines.compile import compile
from ..planner.plan import Plan
from ..solvers.program import Spent
from ..solvers.registry import AUTO, DEFAULT, REGISTERED, SEQUENTIAL

Announce = Callable[[str], None]
TIMED_CALLS = 2

METHODS = {
    **{method.name: method.about for method in REGISTERED},
    "paper": "SRDS as published: ddim jumps, sqrt(N) blocks",
    AUTO: "the plan predicted to be the fastest here",
    "exact": "srds, run until it is the sequential result",
}


def settings_for(name: str, steps: int) -> dict[str, Any]:
    """Arguments of `compile` for a name out of `METHODS`."""
    if name == "paper":
        return {"method": SRDS.published(steps)}
    return {"method": DEFAULT, "exact": True} if name == "exact" else {"method": name}


@dataclass(frozen=True)
class Request:
    """What is asked of every pipeline alike.

    Attributes:
        steps: N.
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
        optional = {
            "guidance_scale": self.guidance,
            "num_images_per_prompt": self.images_per_prompt if self.images_per_prompt > 1 else None,
            "negative_prompt": None if self.negative_prompt is None else [self.negative_prompt] * count,
        }
        return {
            "prompt": list(self.prompts),
            "num_inference_steps": self.steps,
            "generator": generators(self.seed, count * self.images_per_prompt),
            **{name: value for name, value in optional.items() if value is not None},
        }


def generators(seed: int, count: int) -> list[torch.Generator]:
    """One generator per image, on the CPU: then the noise is the same on every device and for every batch size."""
    return [torch.Generator("cpu").manual_seed(seed + image) for image in range(count)]


def grey_levels(images: Tensor, reference: Tensor) -> dict[str, float]:
    """Difference of images [n, channels, height, width] in [0, 1] before they are rounded to 8 bits.

    Returns:
        "mean", "p95" and "max" over the images of each image's mean absolute difference, in grey levels.
    """
    per_image = 255 * (images.double() - reference.double()).abs().flatten(1).mean(1)
    return {"mean": float(per_image.mean()), "p95": float(per_image.quantile(0.95)), "max": float(per_image.max())}


class Calls:
    """Equal calls of one pipeline, stock or compiled.

    Attributes:
        images: [n, channels, height, width] in [0, 1], on the CPU; the same in every call.
        seconds: of each whole call, prompts encoded and images decoded.
        loop_seconds: of the denoising loop of each call; empty for the stock pipeline.
        report: of the last call; None for the stock pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.images = torch.empty(0)
        self.seconds: list[float] = []
        self.loop_seconds: list[float] = []
        self.report: Any = None

    def add(self, request: Request) -> Calls:
        """Make one more call."""
        started = time.perf_counter()
        self.images = self._pipe(**request.arguments(), output_type="pt").images.cpu()  # the copy waits for the device
        self.seconds.append(time.perf_counter() - started)
        self.report = getattr(self._pipe, "report", None)
        if self.report is not None:
            self.loop_seconds.append(self.report.seconds)
        return self


def in_turn(
    pipes: Iterable[tuple[str, Any]], request: Request, rounds: int, announce: Announce = lambda _: None
) -> list[Calls]:
    """Call every pipeline once a round, so that a busy minute of the machine disturbs all of them alike.

    Args:
        pipes: the name to announce, and the pipeline.
    """
    calls = [(name, Calls(pipe)) for name, pipe in pipes]
    for _ in range(rounds):
        for name, done in calls:
            announce(name)
            done.add(request)
    return [done for _, done in calls]


def spread(seconds: Sequence[float]) -> float:
    """Slowest over fastest of equal calls; far above 1 the machine was busy with something else."""
    return max(seconds) / min(seconds)


def verdict(seconds: Sequence[float], other: Sequence[float]) -> str:
    """How `seconds` compare with `other`, in words. Where the times overlap neither is called faster."""
    ratio = min(seconds) / min(other)
    if max(seconds) < min(other):
        return f"{1 / ratio:.2f} times faster than"
    if min(seconds) > max(other):
        return f"{ratio:.2f} times slower than"
    return "neither clearly faster nor slower than"


def compare(
    pipe: Any, request: Request, methods: Sequence[str], rounds: int = 2, announce: Announce = lambda _: None
) -> list[dict[str, Any]]:
    """Measure methods, names out of `METHODS`, at the request's number of steps.

    The sequential method is measured in any case, as the ratio is to it. The first call of each method also warms up.

    Returns:
        For each method, ready for JSON, its counts and: "blocks" (0 for a method without), "iterations" of the image
        that needed most, "difference" to the stock pipeline, "seconds" and "slowest" of its denoising loops, and their
        "ratio" to the sequential method, below 1 being faster.
    """
    announce(f"{request.steps} steps, stock pipeline")
    reference = Calls(pipe).add(request).images
    names = list(dict.fromkeys([SEQUENTIAL, *methods]))
    pipes = [(f"{request.steps} steps, {name}", compile(pipe, **settings_for(name, request.steps))) for name in names]
    done = dict(zip(names, in_turn(pipes, request, rounds, announce), strict=True))
    baseline = min(done[SEQUENTIAL].loop_seconds)
    return [_entry(name, done[name], reference, baseline) for name in names if name in methods]


def _entry(name: str, calls: Calls, reference: Tensor, baseline: float) -> dict[str, Any]:
    report, fastest = calls.report, min(calls.loop_seconds)
    counts = ("coarse_solver", "iterations", "waves", "rows", "peak_rows")
    return {
        "steps": report.num_inference_steps,
        "method": name,
        "blocks": report.num_blocks,
        **{count: getattr(report, count) for count in counts},
        "difference": grey_levels(calls.images, reference),
        "ratio": fastest / baseline,
        "seconds": fastest,
        "slowest": max(calls.loop_seconds),
    }


@dataclass(frozen=True)
class Stage:
    """The images [n, channels, height, width] in [0, 1] after one iteration."""

    iteration: int
    spent: Spent
    images: Tensor


@dataclass(frozen=True)
class Convergence:
    """The iterations of SRDS on the way to the sequential images.

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


def converge(
    pipe: Any, request: Request, num_iterations: int, settings: Mapping[str, Any], announce: Announce = lambda _: None
) -> Convergence:
    """Sample with the stock pipeline, with the compiled one sequentially, and with SRDS, iteration by iteration.

    Every timed call comes after an untimed run of its kind and decodes only its result.

    Args:
        pipe: a latent text-to-image pipeline.
        num_iterations: iterations to look at, whatever the tolerance would say.
        settings: of `compile`, for SRDS.
    """
    fast = compile(pipe, **settings, method=DEFAULT)
    plan = fast.plan_for(**request.arguments())
    announce("warm-up")
    Calls(pipe).add(replace(request, steps=min(2, request.steps)))

    announce("SRDS, iteration by iteration")
    shown = min(num_iterations, plan.num_blocks)
    patient = compile(pipe, **settings, method=DEFAULT, tolerance=0.0, max_iterations=shown)
    program = plan.program()
    # also the warm-up of SRDS
    stages = tuple(
        Stage(look.iteration, program.spent(look.iteration), _decoded(pipe, look.latents))
        for look in patient.stream(**request.arguments())
    )
    pipes = [("stock pipeline", pipe), (SEQUENTIAL, compile(pipe, method=SEQUENTIAL)), ("SRDS", fast)]
    return Convergence(request, plan, stages, *in_turn(pipes, request, TIMED_CALLS, announce))


def _decoded(pipe: Any, latents: Tensor) -> Tensor:
    with torch.no_grad():
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    pixels: Tensor = (images / 2 + 0.5).clamp(0, 1).cpu()
    return pixels
