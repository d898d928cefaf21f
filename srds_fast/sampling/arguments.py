"""Checks of the arguments of `sample`. Each raises InvalidArgument that says what to pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgument, UnsupportedScheduler, shown
from ..planner.settings import MOST_STEPS
from ..schedulers.reader import replaced_methods
from ..solvers.checks import check_number, check_whole
from ..words import counted


def check_functions(denoiser: Any, observer: Any) -> None:
    """The denoiser can be called, and so can the observer if there is one."""
    if not callable(denoiser):
        raise InvalidArgument(f"denoiser is {shown(denoiser)}. Pass a function (x, t) or a module.")
    if observer is not None and not callable(observer):
        raise InvalidArgument(f"observer is {shown(observer)}. Pass a function that takes a Checkpoint, or None.")


def check_signature(denoiser: Any, cond: Mapping[str, Any]) -> None:
    """The denoiser takes x, t and every name of cond, as far as its signature tells."""
    try:
        signature = inspect.signature(denoiser)
    except (TypeError, ValueError):  # of a builtin
        return
    try:
        signature.bind(None, None, **dict.fromkeys(cond))
    except TypeError as error:
        given = ", ".join(["x", "t", *(f"{name}=..." for name in cond)])
        raise InvalidArgument(
            f"denoiser cannot be called as denoiser({given}): {error}. It must take the rows, their timesteps, and "
            "every name of cond. Pass such a function."
        ) from None


def check_noise(x: Any) -> None:
    """x is a dense floating-point tensor [batch, ...] with data."""
    found = f"{x.dtype}, shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or x.numel() == 0:
        raise InvalidArgument(
            f"x is {found}. It must be a floating-point tensor [batch, ...] with at least one sample. "
            "Add a batch dimension with x.unsqueeze(0) if there is none."
        )
    if x.layout != torch.strided or x.is_meta:
        kind = "on the meta device" if x.is_meta else f"of layout {x.layout}"
        raise InvalidArgument(f"x is {found}, {kind}. It must be a dense tensor that holds noise.")


def check_conditioning(cond: Any, batch: int) -> None:
    """cond names tensors [batch, ...]."""
    if not isinstance(cond, Mapping):
        raise InvalidArgument(f"cond is {shown(cond)}. It names tensors. Pass a dict such as {{'labels': labels}}.")
    for name, value in cond.items():
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != batch or not isinstance(name, str):
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InvalidArgument(
                f"cond[{shown(name)}] has {found}. Its name must be a string, and its first dimension the batch, "
                f"{batch}. Repeat a tensor that the samples share, or let the denoiser close over it."
            )


def check_scheduler(scheduler: Any, steps: Any, eta: Any) -> None:
    """It is an instance of a scheduler, for a number of steps and an eta in their range."""
    check_whole("num_inference_steps", steps, 1, MOST_STEPS)
    if eta is not None:
        check_number("eta", eta, 0, why="It scales the noise of a step.")
    if isinstance(scheduler, type) or not hasattr(scheduler, "set_timesteps"):
        raise InvalidArgument(
            f"scheduler is {shown(scheduler)}. It must be an instance of a diffusers scheduler. Pass DDIMScheduler()."
        )
    if replaced := replaced_methods(scheduler):
        raise UnsupportedScheduler(
            f"{replaced[0]} of this {type(scheduler).__name__} was replaced on the object. The steps are read from a "
            "copy, which the function was not made for. Put it into a subclass, and pass an object of that."
        )


def check_generator(generator: Any, batch: int) -> None:
    """One generator, one for each sample, or None."""
    several = isinstance(generator, list | tuple)
    if not all(isinstance(each, torch.Generator | None) for each in (generator if several else [generator])):
        raise InvalidArgument(
            f"generator is {shown(generator)}. It must be a torch.Generator, one for each sample, or None. Pass "
            "torch.Generator(device).manual_seed(seed)."
        )
    if several and len(generator) != batch:
        raise InvalidArgument(
            f"There are {counted(len(generator), 'generator')} for {counted(batch, 'sample')}. Pass one for each "
            "sample, or a single generator."
        )
