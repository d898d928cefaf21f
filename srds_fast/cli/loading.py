"""Opening a pipeline by what a user typed: a bundled name, or a folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from .. import zoo
from ..errors import InvalidArgument

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def silence() -> None:
    """Keep diffusers and transformers from talking about anything but errors, in all of this process."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


def open_pipeline(model: str, device: str, dtype: str, *, ddim: bool = False) -> Any:
    """A text-to-image pipeline, from this machine only.

    Args:
        model: name of a bundled pipeline, or a folder that `save_pretrained` wrote.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1".
        dtype: name of the dtype the networks run in.
        ddim: replace the pipeline's scheduler by DDIM on the same noise schedule.

    Raises:
        InvalidArgument: nothing that can be run is there, or the device is not.
    """
    place = _device(device)
    pipe = zoo.load(model) if model in zoo.names() else _from_folder(model)
    if ddim:
        from diffusers import DDIMScheduler

        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe.to(place, DTYPES[dtype])


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidArgument(f"There is no device {name!r}. Use auto, cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidArgument(f"There is no device {name!r}. PyTorch sees {torch.cuda.device_count()} CUDA devices.")
    return device


def _from_folder(model: str) -> Any:
    from diffusers import DiffusionPipeline

    folder = Path(model)
    if not folder.is_dir():
        raise InvalidArgument(
            f"There is no model {model!r}. It is neither bundled ({', '.join(zoo.names())}) nor a folder. "
            "Give the folder that pipe.save_pretrained wrote."
        )
    if not (folder / "model_index.json").is_file():
        raise InvalidArgument(
            f"{model} holds no pipeline: it has no model_index.json. Give the folder that pipe.save_pretrained wrote."
        )
    try:
        return DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what a damaged folder raises depends on which of its files is damaged
        raise InvalidArgument(f"The pipeline in {model} cannot be loaded: {error}") from error
