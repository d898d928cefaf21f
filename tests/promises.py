"""Methods by what they promise, and schedulers that they run."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from problems import scheduler

from srds_fast.solvers.method import SAME_LAW, Method
from srds_fast.solvers.registry import BY_NAME

# those that give the sample of the sequential sampler; the others give another one with the same law
SAME_SAMPLE = [name for name, method in BY_NAME.items() if method.promise != SAME_LAW]


def same_law(method: str | Method | type[Method]) -> bool:
    """Whether a method, by its name or by its options, promises no more; "auto" promises the sample."""
    promise: Any = getattr(BY_NAME.get(method) if isinstance(method, str) else method, "promise", None)
    return promise == SAME_LAW


def noisy() -> DDPMScheduler:
    """DDPM without clipping, whose levels are those of the closed-form problems."""
    return DDPMScheduler(clip_sample=False)


def stock_of(method: str | Method) -> Any:
    """A scheduler that a method runs: the one of the closed-form problems, with noise where the method needs it."""
    return noisy() if same_law(method) else scheduler()


def call_of(method: str | Method, **settings: Any) -> dict[str, Any]:
    """Settings of a call that is the same each time. Those that ask for the sequential sample are left out if need be.

    settings: of `sample`.
    """
    if not same_law(method):
        return {"method": method, **settings}
    asked = {name: value for name, value in settings.items() if name not in ("exact", "tolerance")}
    return {"method": method, "generator": torch.Generator().manual_seed(4), **asked}


def fitted(pipe: Any, method: str) -> Any:
    """The pipeline with a scheduler that a method runs. It is set on it."""
    if same_law(method):
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    return pipe
