"""What checks of several ranks have in common. A check runs on every rank, and returns what it found as JSON."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tiny
import torch
import torch.distributed as dist
from cancelling import Network
from diffusers import DDIMScheduler
from torch import Tensor, nn

import srds_fast

STEPS = 12
CHECKS: dict[str, Callable[[], Any]] = {}
# checks that are run by name alone: after them the group is of no use, or they take long
NAMED: dict[str, Callable[[], Any]] = {}


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    CHECKS[function.__name__] = function
    return function


def named(function: Callable[[], Any]) -> Callable[[], Any]:
    NAMED[function.__name__] = function
    return function


def rank() -> int:
    return dist.get_rank()


@functools.cache
def own_gpu() -> torch.device:
    """A device for each rank; the default group is one over nccl from now on."""
    device = torch.device("cuda", rank())
    torch.cuda.set_device(device)
    dist.destroy_process_group()
    dist.init_process_group("nccl", device_id=device)
    return device


def ended(call: Callable[[], Any]) -> list[str]:
    """The class and the message of what a call ends in; empty if it returns."""
    try:
        call()
    except BaseException as error:
        return [type(error).__name__, str(error)]
    return []


def noise(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sampled(network: Any = None, x: Tensor | None = None, **settings: Any) -> Any:
    settings.setdefault("scheduler", DDIMScheduler(clip_sample=False))
    scheduler, steps = settings.pop("scheduler"), settings.pop("steps", STEPS)
    network = Network() if network is None else network
    return srds_fast.sample(network, noise() if x is None else x, scheduler, steps, **settings)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def pipeline(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline in float64, the same for all checks, and a call of it."""
    return _pipe(name), {**tiny.PIPELINES[name][1], "num_inference_steps": STEPS, "output_type": "latent"}


@functools.cache
def _pipe(name: str) -> Any:
    pipe = tiny.PIPELINES[name][0]()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.double()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, call: dict[str, Any], seed: int | None = 3) -> Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found: Tensor = pipe(**call, **({} if generator is None else {"generator": generator})).images
    return found
