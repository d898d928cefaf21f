"""From arguments to a pipeline, prompts and settings."""

from __future__ import annotations

import argparse
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from .. import zoo
from ..errors import InvalidArgument, UnsupportedScheduler
from ..pipelines.compile import compile


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Those that are arguments of `compile`."""
    return {name: value for name, value in vars(args).items() if name in inspect.signature(compile).parameters}


def prompts_for(args: argparse.Namespace) -> tuple[str, ...]:
    """The prompts given, or those of the bundled pipeline."""
    if args.prompt:
        return tuple(args.prompt)
    if args.model in zoo.names():
        return tuple(zoo.prompts(args.model))
    raise InvalidArgument(f"It is not known what {args.model} can draw. Give a --prompt for every image.")


def open_for(args: argparse.Namespace, steps: int) -> Any:
    """The pipeline that the arguments name, from this machine only. In this process libraries now print errors only."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    device = _device(args.device)
    pipe = zoo.load(args.model) if args.model in zoo.names() else _from_folder(args.model)
    if args.ddim:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe = pipe.to(device, getattr(torch, args.dtype))
    try:
        compile(pipe)
    except UnsupportedScheduler as error:
        raise UnsupportedScheduler(f"{error} On the command line: --ddim.") from error
    if "prompt" not in inspect.signature(type(pipe).__call__).parameters:
        raise InvalidArgument(f"{type(pipe).__name__} takes no prompt. Give a text-to-image pipeline.")
    trained = int(pipe.scheduler.config.num_train_timesteps)
    if steps > trained:
        raise InvalidArgument(f"{steps} steps are too many. The model was trained with {trained}. Ask for fewer.")
    return pipe


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):  # PyTorch knows more, such as meta, that compute nothing
        raise InvalidArgument(f"There is no device {name!r}. Use auto, cpu, cuda or cuda:1.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidArgument(f"There is no device {name!r}. PyTorch sees {torch.cuda.device_count()} CUDA devices.")
    return device


def _from_folder(model: str) -> Any:
    advice = "Give the folder that pipe.save_pretrained wrote."
    if not Path(model).is_dir():
        bundled = ", ".join(zoo.names())
        raise InvalidArgument(f"There is no model {model!r}. It is neither bundled ({bundled}) nor a folder. {advice}")
    try:
        return diffusers.DiffusionPipeline.from_pretrained(Path(model), local_files_only=True)
    except Exception as error:  # what a damaged folder raises depends on which of its files is damaged
        raise InvalidArgument(f"The pipeline in {model} cannot be loaded: {error} {advice}") from error
