"""Measuring: how far from the sequential image, after how many waves, in how many seconds. Nothing is printed here.

Every difference is to the stock pipeline's own output with the same seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..pipelines.compile import compile
from ..report import Report

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is asked of every pipeline alike.

    Attributes:
        prompts: one image each; sample i starts from a CPU generator seeded with `seed + i`.
        steps: N.
        guidance: guidance scale.
        seed: of the first sample.
    """

    prompts: tuple[str, ...]
    steps: int
    guidance: float
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Arguments of a pipeline call, with generators that nobody has drawn from yet."""
        return {
            "prompt": list(self.prompts),
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "generator": generators(self.seed, len(self.prompts)),
        }


def generators(seed: int, count: int) -> list[torch.Generator]:
    """One generator a sample, on the CPU: the noise is then the same on every device and for every batch size."""
    return [torch.Generator("cpu").manual_seed(seed + sample) for sample in range(count)]


@dataclass(frozen=True)
class Difference:
    """Difference to the sequential images in grey levels: of each sample the mean, over the samples these three."""

    mean: float
    p95: float
    max: float


def grey_levels(images: Tensor, reference: Tensor) -> Difference:
    """Compare images before they are rounded to 8 bits.

    Args:
        images: [n, channels, height, width] in [0, 1].
        reference: of the same shape.
    """
    per_sample = 255 * (images.double() - reference.double()).abs().flatten(1).mean(1)
    return Difference(mean=float(per_sample.mean()), p95=float(per_sample.quantile(0.95)), max=float(per_sample.max()))


@dataclass(frozen=True)
class Call:
    """One call of a pipeline.

    Attributes:
        images: [n, channels, height, width] in [0, 1], on the CPU.
        seconds: of the whole call, prompts encoded and images decoded.
        report: of the denoising loop; None for the stock pipeline.
    """

    images: Tensor
    seconds: float
    report: Report | None


def call(pipe: Any, request: Request) -> Call:
    """Call a pipeline, stock or compiled, and take the time."""
    started = time.perf_counter()
    images = pipe(**request.arguments(), output_type="pt").images.cpu()  # the copy waits for the device
    seconds = time.perf_counter() - started
    return Call(images, seconds, getattr(pipe, "report", None))


class Seconds:
    """Times of the same thing. The fastest is the one the rest of the machine disturbed least."""

    def __init__(self, times: Sequence[float]) -> None:
        self.fastest = min(times)
        self.slowest = max(times)

    @property
    def spread(self) -> float:
        """Slowest through fastest; far above 1 the machine was busy with something else."""
        return self.slowest / self.fastest


def loop_seconds(calls: Sequence[Call]) -> Seconds:
    """Of the denoising loops alone, where a compiled pipeline was called."""
    return Seconds([done.report.seconds for done in calls if done.report is not None])


def verdict(seconds: Seconds, other: Seconds) -> str:
    """How `seconds` compare with `other`, in words. Where the times overlap neither is called faster."""
    ratio = seconds.fastest / other.fastest
    if seconds.slowest < other.fastest:
        return f"{1 / ratio:.2f} times faster than"
    if seconds.fastest > other.slowest:
        return f"{ratio:.2f} times slower than"
    return "neither clearly faster nor slower than"


@dataclass(frozen=True)
class Contestant:
    """A named way to sample, for `compare`.

    Attributes:
        about: one line for people.
        settings: arguments of `compile` for a number of steps.
    """

    about: str
    settings: Callable[[int], dict[str, Any]]


BASELINE = "sequential"
CONTESTANTS = {
    BASELINE: Contestant("one row a wave, in our loop", lambda steps: {"method": "sequential"}),
    "paper": Contestant(
        "SRDS as published: ddim jumps, sqrt(N) blocks",
        lambda steps: {"method": "srds", "coarse_solver": "ddim", "num_blocks": max(1, round(math.sqrt(steps)))},
    ),
    "srds": Contestant("SRDS with our defaults: 2m jumps, more blocks", lambda steps: {"method": "srds"}),
    "collocation": Contestant(
        "all points refined at once, few nodes evaluated a wave", lambda steps: {"method": "collocation"}
    ),
    "parataa": Contestant("all points refined and evaluated at once", lambda steps: {"method": "parataa"}),
    "paradigms": Contestant("Picard iteration on a sliding window of 10", lambda steps: {"method": "paradigms"}),
    "chords": Contestant("four cores that begin further and further along", lambda steps: {"method": "chords"}),
    "auto": Contestant("the plan predicted to be the fastest here", lambda steps: {"method": "auto"}),
    "exact": Contestant(
        "the same, run until it is the sequential result", lambda steps: {"method": "srds", "exact": True}
    ),
}


@dataclass(frozen=True)
class Entry:
    """One method at one number of steps.

    Attributes:
        blocks, coarse_solver: 0 and None for the sequential method.
        iterations: of the sample that needed most.
        difference: to the stock pipeline's images, in grey levels.
        ratio: seconds divided by those of the sequential method; below 1 is faster.
        seconds: of the denoising loop, the fastest of the calls; slowest: the slowest of them.
    """

    steps: int
    method: str
    blocks: int
    coarse_solver: str | None
    iterations: int
    waves: int
    rows: int
    peak_rows: int
    difference: Difference
    ratio: float
    seconds: float
    slowest: float


def compare(
    pipe: Any,
    request: Request,
    methods: Sequence[str],
    calls: int = 2,
    announce: Announce = lambda _: None,
) -> list[Entry]:
    """Measure methods at the request's number of steps.

    The sequential method is measured in any case, as the ratio is to it. The methods take turns, so that a busy minute
    of the machine meets them all.

    Args:
        pipe: a text-to-image pipeline.
        request: what to sample.
        methods: names out of `CONTESTANTS`.
        calls: of each method, the fastest counts; the first one also warms up.
        announce: told what runs next.
    """
    announce(f"{request.steps} steps, stock pipeline")
    reference = call(pipe, request).images
    names = dict.fromkeys([BASELINE, *methods])
    pipes = {name: compile(pipe, **CONTESTANTS[name].settings(request.steps)) for name in names}
    done: dict[str, list[Call]] = {name: [] for name in names}
    for _ in range(calls):
        for name, fast in pipes.items():
            announce(f"{request.steps} steps, {name}")
            done[name].append(call(fast, request))
    baseline = loop_seconds(done[BASELINE])
    return [_entry(name, done[name], reference, baseline) for name in names if name in methods]


def _entry(name: str, calls: Sequence[Call], reference: Tensor, baseline: Seconds) -> Entry:
    report, seconds = calls[-1].report, loop_seconds(calls)
    assert report is not None, "a compiled pipeline reports"
    return Entry(
        steps=report.num_inference_steps,
        method=name,
        blocks=report.num_blocks,
        coarse_solver=report.coarse_solver,
        iterations=report.iterations,
        waves=report.waves,
        rows=report.rows,
        peak_rows=report.peak_rows,
        difference=grey_levels(calls[-1].images, reference),
        ratio=seconds.fastest / baseline.fastest,
        seconds=seconds.fastest,
        slowest=seconds.slowest,
    )
