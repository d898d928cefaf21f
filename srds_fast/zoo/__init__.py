"""Trained diffusers pipelines that are part of the package: small, and usable offline.

The solvers are tested and measured on them if no large model is available::

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
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PROMPTS = {"digits": tuple(f"the digit {word}" for word in WORDS)}


def names() -> list[str]:
    """The names of the bundled pipelines."""
    return sorted(_PROMPTS)


def prompts(name: str) -> list[str]:
    """Prompts that the pipeline was trained on; for "digits" ten prompts, 0 to 9 in order.

    Raises:
        InvalidArgument: (a ValueError) there is no pipeline of that name.
    """
    return list(_PROMPTS[_known(name)])


def load(name: str, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The bundled pipeline on the CPU, loaded offline, its networks in ``dtype`` and in evaluation mode.

    The weights are stored in float16 and converted. "digits" makes 32x32 images from latents of shape
    ``[n, 4, 8, 8]``. Each call returns a new pipeline.

    Raises:
        InvalidArgument: (a ValueError) there is no pipeline of that name.
    """
    return load_from(_FOLDER / _known(name), dtype)


def load_from(folder: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The pipeline saved in a folder, see `load`."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, local_files_only=True, safety_checker=None, low_cpu_mem_usage=False
    )
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        # not diffusers' own `to`: it warns about modules to keep in float32, but there are none
        torch.nn.Module.to(part, dtype=dtype)
        part.eval()
    return pipeline


def _known(name: str) -> str:
    if name not in _PROMPTS:
        raise InvalidArgument(f"There is no bundled pipeline {name!r}. Use one of: {', '.join(names())}.")
    return name
