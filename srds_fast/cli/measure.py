"""Measuring calls: how far from the sequential image, in how many seconds. Nothing is printed here.

Every difference is to the output of the pipeline's own call with the same seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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


Told = Callable[[str], None]
"""Told what begins next, see `output.progress`."""


def in_turn(pipes: Mapping[str, Any], request: Request, rounds: int, told: Told) -> list[Calls]:
    """Call every pipeline once a round, so that a busy minute of the machine disturbs all of them alike.

    Args:
        pipes: by the name that `told` is given before each call.
    """
    calls = {name: Calls(pipe) for name, pipe in pipes.items()}
    for _ in range(rounds):
        for name, done in calls.items():
            told(name)
            done.add(request)
    return list(calls.values())


def verdict(seconds: Sequence[float], other: Sequence[float]) -> str:
    """How `seconds` compare with `other`, in words. Where the times overlap neither is called faster."""
    ratio = min(seconds) / min(other)
    if max(seconds) < min(other):
        return f"{1 / ratio:.2f} times faster than"
    if min(seconds) > max(other):
        return f"{ratio:.2f} times slower than"
    return "neither clearly faster nor slower than"
