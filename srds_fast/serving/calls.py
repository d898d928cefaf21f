"""Calls of a pipeline for the images of requests: their arguments, their PNG files, and what they have taken."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from .. import zoo
from ..telemetry.report import Report
from .contract import ImageRequest, Usage
from .settings import ServerSettings

# calls whose times tell what the next one of the kind takes, and the share of them that took no longer
LAST, SHARE = 20, 0.9
# the fastest level: higher ones make files a little smaller, and take several times as long
COMPRESSION = 1
# of warm-ups of pipelines that are not bundled
PROMPT, NEGATIVE_PROMPT = "a photograph of a lighthouse by the sea in the evening", "blurred"


class Asked(NamedTuple):
    """One image of a request."""

    prompt: str
    negative_prompt: str | None
    seed: int

    @classmethod
    def for_warming(cls, kind: KindOfCall, model: str, batch: int) -> list[Asked]:
        """What a warm-up draws."""
        prompt = zoo.prompts(model)[0] if model in zoo.names() else PROMPT
        return [cls(prompt, NEGATIVE_PROMPT if kind.negative else None, seed) for seed in range(batch)]


class KindOfCall(NamedTuple):
    """What a plan is held for, together with the batch size."""

    steps: int
    width: int | None
    height: int | None
    guidance_scale: float | None
    negative: bool  # whether there is a negative prompt

    @classmethod
    def of(cls, request: ImageRequest, settings: ServerSettings) -> KindOfCall:
        guidance = guidance_for(settings, request.guidance_scale)
        return cls(request.steps, request.width, request.height, guidance, request.negative_prompt is not None)

    def is_like(self, other: KindOfCall) -> bool:
        """Whether they differ in the value of the guidance scale alone, not in whether there is guidance."""
        return self._guided == other._guided and self._replace(guidance_scale=other.guidance_scale) == other

    @property
    def _guided(self) -> bool:
        return self.guidance_scale is None or self.guidance_scale > 1

    def arguments(self, images: Sequence[Asked]) -> dict[str, Any]:
        """Arguments of a call. Lists also of one image: what a plan is held for depends on the types."""
        asked = {
            "prompt": [image.prompt for image in images],
            "num_inference_steps": self.steps,
            # on the CPU: then the noise is the same on every device and for every batch size
            "generator": [torch.Generator("cpu").manual_seed(image.seed) for image in images],
            "guidance_scale": self.guidance_scale,
            "width": self.width,
            "height": self.height,
            "negative_prompt": [image.negative_prompt for image in images] if self.negative else None,
        }
        return {name: value for name, value in asked.items() if value is not None}


@dataclass
class Prepared:
    """Calls of one kind that were warmed up.

    Attributes:
        fast: the compiled pipeline that makes them.
        fallback: why they run on the pipeline's own loop; None if they do not.
    """

    fast: Any
    kind: KindOfCall
    fallback: str | None
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))

    @property
    def expected(self) -> float:
        """Seconds that most of the last calls took at most."""
        ordered = sorted(self._seconds)
        return ordered[min(len(ordered) - 1, int(SHARE * len(ordered)))]

    def take_times_of(self, other: Prepared) -> None:
        """Expect what calls of another kind have taken."""
        self._seconds.extend(other._seconds)

    def call(self, images: Sequence[Asked]) -> tuple[list[bytes], Usage]:
        """PNG files of the images, by one call."""
        begun = time.perf_counter()
        files = [png(image) for image in self.fast(**self.kind.arguments(images)).images]
        self._seconds.append(time.perf_counter() - begun)
        return files, usage_of(self.fast.report)


def guidance_for(settings: ServerSettings, asked: float | None) -> float | None:
    """The guidance scale of a call; None leaves it to the pipeline."""
    if asked is not None:
        return asked
    if settings.guidance_scale is None and settings.model in zoo.names():
        return zoo.GUIDANCE
    return settings.guidance_scale


def images_of(request: ImageRequest) -> list[Asked]:
    """Each image that a request asks for."""
    first = request.seed or 0
    return [Asked(request.prompt, request.negative_prompt, first + number) for number in range(request.n)]


def png(image: Any) -> bytes:
    """The PNG file of a PIL image."""
    in_memory = io.BytesIO()
    image.save(in_memory, format="PNG", compress_level=COMPRESSION)
    return in_memory.getvalue()


def usage_of(report: Report | None) -> Usage:
    """What one call has cost; the times of the request are filled in by who knows when it came."""
    if report is None:
        return Usage(0.0, 0.0, 0, 0, "unknown")
    return Usage(
        seconds=report.seconds,
        queued_seconds=0.0,
        waves=report.waves,
        rows=report.rows,
        plan=report.plan or report.method,
        fallback=report.fallback_reason,
        missed=report.missed,
    )


def sum_of(used: Sequence[Usage]) -> Usage:
    """Of the calls that made the images of a request. used: of each image the usage of its call."""
    calls = list({id(each): each for each in used}.values())
    return replace(
        calls[-1],
        waves=sum(each.waves for each in calls),
        rows=sum(each.rows for each in calls),
        missed=sum(each.missed for each in calls),
        fallback=next((each.fallback for each in calls if each.fallback is not None), None),
    )
