"""Every scheduler class of diffusers: whether its steps are read, and whether samples are those of its own loop."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers.schedulers
import torch
from torch import Tensor

import srds_fast
from srds_fast.errors import UnsupportedScheduler
from srds_fast.schedulers.own_loop import OwnLoop
from srds_fast.schedulers.table import NoiseTable
from srds_fast.schedulers.verify import noise_table

from .verdicts import EXACT, FAILED, REFUSED, ROUNDING, WRONG, first_sentence

STEPS = 20
# of a scheduler that is made with arguments, or that takes fewer steps
CONFIGS: dict[str, dict[str, Any]] = {"AmusedScheduler": {"mask_token_id": 1}}
FEWER = {"CMStochasticIterativeScheduler": 10, "SCMScheduler": 2}
# options by which a class clips or thresholds, and what leaves that out
UNCLIPPED = {"clip_sample": False, "clip_denoised": False}
METHODS = ("srds", "collocation")
NO_STEP = "it has no steps to set"


def classes() -> list[str]:
    return sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler"))


def network(x: Tensor, t: Tensor) -> Tensor:
    """A smooth function of state and time, whatever the unit of time."""
    return torch.tanh(x) * (0.5 + torch.sigmoid(t.to(x))[:, None] / 4)


def own_loop(scheduler: Any, table: NoiseTable, x: Tensor) -> Tensor:
    """The scheduler's own steps, one after another."""
    torch.manual_seed(5)  # for noise that does not come from the generator
    loop = OwnLoop(scheduler, table.call, generator=torch.Generator().manual_seed(5))
    for t in table.timesteps:
        x = loop.step(network(loop.scaled(x), t.expand(len(x))), x)
    return x


def verdict(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The row of a class with these options."""
    row: dict[str, Any] = {"scheduler": name.removesuffix("Scheduler"), "config": config}
    try:
        scheduler = getattr(diffusers.schedulers, name)(**CONFIGS.get(name, {}), **config)
        if not hasattr(scheduler, "set_timesteps"):
            return {**row, "verdict": REFUSED, "reason": NO_STEP}
        steps = FEWER.get(name, STEPS)
        scheduler.set_timesteps(steps)
    except Exception as why:  # what a class that needs arguments or a package raises
        return {**row, "verdict": REFUSED, "reason": f"not made: {first_sentence(why)}"}
    try:
        table = noise_table(scheduler)
    except UnsupportedScheduler as why:
        return {**row, "verdict": REFUSED, "reason": first_sentence(why)}
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    off, vectors = 0.0, 1
    try:
        expected = own_loop(scheduler, table, x)
        for method in METHODS:
            torch.manual_seed(5)
            noise = torch.Generator().manual_seed(5)
            found = srds_fast.sample(network, x, scheduler, steps, method=method, exact=True, generator=noise)
            off = max(off, float((found.sample - expected).abs().max() / expected.abs().max()))
            vectors = found.report.state_vectors
    except Exception as why:
        return {**row, "verdict": FAILED, "reason": f"{type(why).__name__}: {first_sentence(why)}"}
    about = {"turns": table.num_steps, "vectors": vectors, "noise": table.spread is not None}
    return {**row, "verdict": EXACT if off <= ROUNDING else WRONG, "difference": float(f"{off:.1e}"), **about}


def verdicts() -> list[dict[str, Any]]:
    """A row for every class at its defaults, and one without clipping where these are refused and clip."""
    rows = []
    for name in classes():
        rows.append(verdict(name, {}))
        taken = inspect.signature(getattr(diffusers.schedulers, name).__init__).parameters
        options = {key: off for key, off in UNCLIPPED.items() if key in taken and taken[key].default is True}
        if options and rows[-1]["verdict"] == REFUSED:
            rows.append(verdict(name, options))
    return rows
