"""Checks every noise table against the scheduler's own `step` before it is used.

An option that the builder does not know shows as a difference, and the scheduler is refused.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedScheduler
from .builders import builder_of
from .table import NoiseTable


def noise_table(scheduler: Any, *, clip_epsilon: bool = False, eta: float = 0.0) -> NoiseTable:
    """Table of a scheduler whose `set_timesteps` has run, checked against its own `step`.

    The scheduler is not changed: the check runs on a copy and draws from a separate generator. Tables are cached by
    everything they depend on, so the calls of a pipeline check its scheduler once per number of steps.
    clip_epsilon and eta are DDIM's `use_clipped_model_output` and `eta`. Raises UnsupportedScheduler if its class has
    no builder, an option is refused, or its step differs from the table.
    """
    key = _cache_key(scheduler), clip_epsilon, eta
    table = _checked.get(key)
    if table is None:
        table = _build(scheduler, clip_epsilon, eta)
        for oldest in list(_checked)[: max(0, len(_checked) + 1 - MAX_CHECKED)]:
            _checked.pop(oldest, None)
        _checked[key] = table
    return table


# a check runs every step of the scheduler, which is too slow for every call
MAX_CHECKED = 64
_checked: dict[Hashable, NoiseTable] = {}


def _cache_key(scheduler: Any) -> Hashable:
    """Everything a table depends on, by value: class, an overridden step(), config and all tensors."""
    state = vars(scheduler)
    tensors = tuple(
        (name, str(value.dtype), value.cpu().numpy().tobytes())
        for name, value in sorted(state.items())
        if isinstance(value, Tensor)
    )
    options = repr(sorted(scheduler.config.items()))
    return type(scheduler), state.get("step"), options, scheduler.num_inference_steps, tensors


def _build(scheduler: Any, clip_epsilon: bool, eta: float) -> NoiseTable:
    _, builder = builder_of(scheduler)
    if eta and "eta" not in inspect.signature(builder).parameters:
        raise UnsupportedScheduler(
            f"{type(scheduler).__name__} takes no eta, but {eta} was given. This scheduler sets its noise itself. "
            "Leave eta out, or use DDIMScheduler."
        )
    table = builder(scheduler, **({"eta": eta} if eta else {}))
    columns = ("alpha_next", "sigma_next", "p", "q", "r", "s", "input_scale")
    if not all(math.isfinite(value) for name in columns for value in table.numbers[name]):
        raise UnsupportedScheduler(
            f"{type(scheduler).__name__} divides by zero in one of its {table.num_steps} steps. The cause may be "
            "epsilon prediction with rescale_betas_zero_snr, or shift_terminal with one step. "
            "Use prediction_type='v_prediction', drop the option, or use more steps."
        )
    if clip_epsilon:
        table = replace(table, clip_epsilon=True)
    _check_against(scheduler, table, eta)
    return table


def check_scheduler(scheduler: Any) -> None:
    """Raise UnsupportedScheduler unless a table of ten steps can be built on a copy of this scheduler.

    One that needs more than a number of steps to set its timesteps (dynamic shifting) is checked in the first call.
    """
    builder_of(scheduler)
    trial = copy.deepcopy(scheduler)
    if not trial.config.get("use_dynamic_shifting", False):
        trial.set_timesteps(min(10, int(trial.config.num_train_timesteps)))
        noise_table(trial)


def _check_against(scheduler: Any, table: NoiseTable, eta: float) -> None:
    """Compare every step with the scheduler's own, on random samples; each must draw noise where the table says."""
    trial = copy.deepcopy(scheduler)
    trial.timesteps = trial.timesteps.cpu()
    if hasattr(trial, "set_begin_index"):  # img2img pipelines set another begin index
        trial.set_begin_index(0)
        trial._step_index = None
    noise = torch.Generator().manual_seed(1)
    known = {"use_clipped_model_output": table.clip_epsilon, "eta": eta, "generator": noise}
    options: Any = {name: known[name] for name in known.keys() & inspect.signature(trial.step).parameters}
    draw = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0_prev = None
    for index in range(table.num_steps):
        x0, eps, m = draw
        x = table.alpha[index] * x0 + table.sigma[index] * eps
        timestep = trial.timesteps[index]
        scaled = trial.scale_model_input(x, timestep) if hasattr(trial, "scale_model_input") else x
        expected_noise, z = noise.clone_state(), None
        if table.draws is not None and bool(table.draws[index]):
            z = torch.randn(m.shape, dtype=m.dtype, generator=expected_noise)
        expected = trial.step(m, timestep, x, **options, return_dict=False)[0].double()
        found, x0_prev = table.step(index, x, m, x0_prev, z)
        size = float(expected.abs().max())
        differences = found - expected, scaled - table.input_scale[index] * x
        difference = max(float(each.abs().max()) for each in differences)
        # float32 rounding inside the scheduler is allowed for; an unknown option gives far larger differences
        close = math.isfinite(size) and difference <= 4e-6 * max(1.0, size, float(x.abs().max()))
        if not (close and torch.equal(noise.get_state(), expected_noise.get_state())):
            raise UnsupportedScheduler(
                f"{type(scheduler).__name__} steps differently from its table: step {index} of {table.num_steps} is "
                f"off by {difference:.2g}. An option in its config, or a changed step(), is not supported. "
                f"Compare it with `diffusers.{builder_of(scheduler)[0]}()` and remove the option."
            )
