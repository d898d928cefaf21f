"""Trained models that are part of the package: small, and usable offline.

The solvers are tested and measured on them if no large model is available. "digits" is a pipeline of diffusers that
draws digits, "policy" a robot policy that pushes a disc to a goal::

    from srds_fast import zoo

    pipe = zoo.load("digits")
    image = pipe("the digit seven", num_inference_steps=50, guidance_scale=3.0).images[0]

    policy = zoo.load("policy")
    task = policy.task(seed=0)
    while not task.done:
        task.run(policy(task.observation()))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from ..errors import InvalidArgument, shown

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from .push_policy import PushPolicy

_FOLDER = Path(__file__).parent
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PROMPTS = {"digits": tuple(f"the digit {word}" for word in WORDS)}
_POLICY = "policy"
# guidance scale of the bundled pipelines, where none is asked for
GUIDANCE = 3.0


def names() -> list[str]:
    """The names of the bundled pipelines. The robot policy is none: its name, "policy", is not among them."""
    return sorted(_PROMPTS)


def prompts(name: str) -> list[str]:
    """Prompts that the pipeline was trained on; for "digits" ten prompts, 0 to 9 in order.

    Raises:
        InvalidArgument: (a ValueError) there is no pipeline of that name.
    """
    if not isinstance(name, str) or name not in _PROMPTS:
        raise InvalidArgument(
            f"There is no bundled pipeline {shown(name)} with prompts. Use one of: {', '.join(names())}."
        )
    return list(_PROMPTS[name])


@overload
def load(name: Literal["digits"], dtype: torch.dtype = ...) -> StableDiffusionPipeline: ...
@overload
def load(name: Literal["policy"], dtype: torch.dtype = ...) -> PushPolicy: ...
@overload
def load(name: str, dtype: torch.dtype = ...) -> Any: ...
def load(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A bundled model on the CPU, loaded offline, its networks in ``dtype`` and in evaluation mode.

    The weights are stored in float16 and converted. Each call returns a new model.

    Args:
        name: "digits", a `StableDiffusionPipeline` that makes 32x32 images from latents of shape ``[n, 4, 8, 8]``; or
            "policy", a `PushPolicy` that makes 8 actions, each x and y, from noise of shape ``[n, 16, 2]``.

    Raises:
        InvalidArgument: (a ValueError) there is no model of that name.
    """
    if not isinstance(name, str) or name not in (*_PROMPTS, _POLICY):
        raise InvalidArgument(f"There is no bundled model {shown(name)}. Use one of: {', '.join([*names(), _POLICY])}.")
    if name == _POLICY:
        from .push_policy import PushPolicy

        return PushPolicy.from_pretrained(_FOLDER / _POLICY, dtype)
    return load_from(_FOLDER / name, dtype)


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
