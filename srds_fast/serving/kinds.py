"""Kinds of requests: what a plan is held for. A server answers the kinds that its settings name, all of them warm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch

from .. import zoo
from .contract import ImageRequest
from .settings import ServerSettings

# of warm-ups of pipelines that are not bundled
PROMPT, NEGATIVE_PROMPT = "a photograph of a lighthouse by the sea in the evening", "blurred"


class Image(NamedTuple):
    """One image of a request."""

    prompt: str
    negative_prompt: str | None
    seed: int


class Kind(NamedTuple):
    """Requests of one kind may share a call. They differ in prompts, seeds, and in how many images they ask for.

    All else changes what the loop of a pipeline does, the value of the guidance scale too: a plan is held for it.
    """

    steps: int
    width: int | None
    height: int | None
    guidance_scale: float | None
    negative: bool  # whether there is a negative prompt

    @classmethod
    def of(cls, request: ImageRequest) -> Kind:
        size = request.width, request.height
        return cls(request.steps, *size, request.guidance_scale, request.negative_prompt is not None)

    def arguments(self, images: Sequence[Image]) -> dict[str, Any]:
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

    def images_for_warming(self, model: str, count: int) -> list[Image]:
        """What a warm-up draws."""
        prompt = zoo.prompts(model)[0] if model in zoo.names() else PROMPT
        return [Image(prompt, NEGATIVE_PROMPT if self.negative else None, seed) for seed in range(count)]


def kinds_of(settings: ServerSettings) -> list[Kind]:
    """All kinds of requests that a server answers."""
    sizes = settings.sizes or ((None, None),)
    negative = (False, True) if settings.negative_prompts else (False,)
    asked = product(settings.steps, sizes, guidance_scales(settings), negative)
    return [Kind(steps, *size, guidance, negative) for steps, size, guidance, negative in asked]


def guidance_scales(settings: ServerSettings) -> tuple[float | None, ...]:
    """Those that requests may ask for. The first is that of a request that names none. None: the pipeline's own."""
    if settings.guidance:
        return settings.guidance
    return (zoo.GUIDANCE if settings.model in zoo.names() else None,)


def images_of(request: ImageRequest) -> list[Image]:
    """Each image that a request asks for."""
    first = request.seed or 0
    return [Image(request.prompt, request.negative_prompt, first + number) for number in range(request.n)]
