"""Trained pipelines that travel with the package: small, offline, and genuine diffusers pipelines.

They are what the solvers are tested and measured on where no large model is at hand::

    from srds_fast import zoo

    pipe = zoo.load("digits")
    image = pipe("the digit seven", num_inference_steps=50, guidance_scale=3.0).images[0]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import InvalidArgument

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_FOLDER = Path(__file__).parent
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PROMPTS = {"digits": tuple(f"the digit {word}" for word in _DIGITS)}


def names() -> list[str]:
    """Return the names of the bundled pipelines."""
    return sorted(_PROMPTS)


def prompts(name: str) -> list[str]:
    """Return prompts that the pipeline ``name`` was trained on; for "digits" ten, of the digits 0 to 9 in order.

    Raises:
        InvalidArgument: (a ValueError) there is no pipeline of that name.
    """
    return list(_PROMPTS[_known(name)])


def load(name: str, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Return the bundled pipeline ``name`` on the CPU, offline, its networks in ``dtype`` and in evaluation mode.

    The weights are stored in float16; ``dtype`` is what they are run in. "digits" draws 32x32 images from latents of
    shape ``[n, 4, 8, 8]``. Each call returns a pipeline of its own.

    Raises:
        InvalidArgument: (a ValueError) there is no pipeline of that name.
    """
    folder = _FOLDER / _known(name)
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, local_files_only=True, safety_checker=None, low_cpu_mem_usage=False
    )
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        # diffusers' own `to` warns of modules to keep in float32, of which there are none
        torch.nn.Module.to(part, dtype=dtype)
        part.eval()
    return pipeline


def _known(name: str) -> str:
    """Return ``name`` if it is a bundled pipeline's, raise otherwise."""
    if name not in _PROMPTS:
        raise InvalidArgument(f"There is no bundled pipeline {name!r}. Use one of: {', '.join(names())}.")
    return name
