"""Makes the noise table of a scheduler, and checks it against the scheduler's own `step` before it is used.

What a builder does not know, or reading did not see, shows as a difference. The scheduler is then refused.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..caches import Cache, of_process
from ..errors import InvalidArgument, UnsupportedScheduler, shown
from ..kernels.common.clamping import Clip, range_of
from .builders import builder_of, clip_of
from .own_loop import OwnLoop, StepCall
from .private_draws import PrivateDraws, Seeded
from .read_table import table_by_reading
from .reader import state_key
from .refusal import refused
from .table import NoiseTable


def noise_table(
    scheduler: Any,
    *,
    clip_epsilon: bool = False,
    eta: float | None = None,
    asked: frozenset[str] = frozenset(),
    dtype: torch.dtype | None = None,
) -> NoiseTable:
    """Table of a scheduler whose `set_timesteps` has run, checked against its own `step`.

    The scheduler is not changed: the check runs on a copy and draws from a separate generator. Tables are cached by
    everything they depend on, so the calls of a pipeline check its scheduler once per number of steps.
    clip_epsilon and eta are the options `use_clipped_model_output` and `eta` of DDIM's step; eta=None leaves the
    default of the step, which is 0 for DDIM and 0.3 for TCD. asked, dtype: see `StepCall`. Raises UnsupportedScheduler
    if the step cannot be said by a table, or differs from it, and InvalidArgument if eta is out of its range.
    """
    key = state_key(scheduler), clip_epsilon, eta, asked, dtype
    table = _checked.get(key)
    if table is None:
        with torch.device("cpu"), PrivateDraws():  # a step may make tensors and draw where it is told nothing
            table = _build(scheduler, clip_epsilon, StepCall.of(scheduler, eta, asked, dtype))
        _checked[key] = table
    return table


# a check runs every step of the scheduler, which is too slow for every call
MAX_CHECKED = 64
_checked: Cache[NoiseTable] = of_process("tables of schedulers", MAX_CHECKED)


def _build(scheduler: Any, clip_epsilon: bool, call: StepCall) -> NoiseTable:
    name, eta = type(scheduler).__name__, call.eta
    if eta and not takes_eta(scheduler):
        raise UnsupportedScheduler(
            f"{name} takes no eta, but {eta} was given. This scheduler sets its noise itself. "
            "Leave eta out, or use DDIMScheduler."
        )
    if eta is not None and not (isinstance(eta, int | float) and 0.0 <= eta <= 1.0) and takes_eta(scheduler):
        raise InvalidArgument(
            f"eta is {shown(eta)}. It scales the noise that a step of {name} adds, and 1 adds as much as DDPM. Pass a "
            "number from 0 to 1."
        )
    builder, options = builder_of(scheduler), {"eta": eta} if eta else {}
    table = table_by_reading(scheduler, call) if builder is None else builder(scheduler, **options)
    columns = ("alpha_next", "sigma_next", "p", "q", "r", "s", "input_scale")
    if not all(math.isfinite(value) for name in columns for value in table.numbers[name]):
        raise UnsupportedScheduler(
            f"{name} divides by zero in one of its {table.num_steps} steps. The cause may be epsilon prediction with "
            "rescale_betas_zero_snr, or shift_terminal with one step. "
            "Use prediction_type='v_prediction', drop the option, or use more steps."
        )
    table = replace(table, clip_epsilon=clip_epsilon or table.clip_epsilon, call=call)
    candidates = [table] if builder is not None or table.clip is None else list(_clipping(scheduler, table))
    for candidate in candidates[:-1]:
        with suppress(UnsupportedScheduler):
            _check_against(scheduler, candidate, call)
            return candidate
    _check_against(scheduler, candidates[-1], call)
    return candidates[-1]


def _clipping(scheduler: Any, table: NoiseTable) -> Iterator[NoiseTable]:
    """What a step that clips may do: reading it does not tell whether its eps is that of the clipped x0.

    Nor does it tell a clamp from a threshold that depends on all elements.
    """
    clips: list[Clip | None] = [table.clip]
    if scheduler.config.get("thresholding", False):
        clips.append(clip_of(scheduler.config))
    for clip in clips:
        yield replace(table, clip=clip)
        yield replace(table, clip=clip, clip_epsilon=not table.clip_epsilon)


def check_scheduler(scheduler: Any) -> None:
    """Raise UnsupportedScheduler unless a table of ten steps can be built on a copy of this scheduler.

    One that cannot set ten timesteps without further arguments is checked in the first call.
    """
    trial_table(scheduler, None)


def adds_noise(scheduler: Any, eta: float | None = None) -> bool:
    """Whether the scheduler's steps add fresh noise. eta: of the call; has no effect if the step does not take it."""
    table = trial_table(scheduler, eta if takes_eta(scheduler) else None)
    return table is not None and table.spread is not None


def takes_eta(scheduler: Any) -> bool:
    return "eta" in inspect.signature(scheduler.step).parameters


def trial_table(scheduler: Any, eta: float | None) -> NoiseTable | None:
    """The table of ten steps of a copy of this scheduler; None if it cannot set them without further arguments."""
    trial = copy.deepcopy(scheduler)
    steps = min(10, int(trial.config.get("num_train_timesteps", 10)))
    # dynamic shifting needs a number that depends on the image; any one shows what its steps are
    shift = {"mu": 1.0} if trial.config.get("use_dynamic_shifting", False) else {}
    try:
        with torch.device("cpu"):
            trial.set_timesteps(steps, **shift)
    except Exception:
        return None
    return noise_table(trial, eta=eta)


def _check_against(scheduler: Any, table: NoiseTable, call: StepCall) -> None:
    """Compare every step of a loop with the scheduler's own; each must draw noise where the table says."""
    options = {}
    if "use_clipped_model_output" in inspect.signature(scheduler.step).parameters and builder_of(scheduler) is not None:
        options["use_clipped_model_output"] = table.clip_epsilon
    shape = (2, 3, 4, 4)
    draw, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    asked: list[Tensor] | None = None
    if table.step_noise is not None:  # the draws of all steps first, of which the loop repeats the numbers
        with Seeded():
            zeros = torch.zeros(shape, dtype=torch.float64, device="cpu")
            like = zeros, zeros.dtype, zeros.dtype, noise.clone_state()
            asked = list(table.step_noise.of(table.spreads, *like))
    x = table.init_noise_sigma * torch.randn(shape, dtype=torch.float64, generator=draw, device="cpu")
    carried, number = None, table.numbers
    clip = table.clip if table.learned is None else table.learned.clip
    with Seeded():
        loop = OwnLoop(scheduler, call, generator=noise, options=options)
        for index in range(table.num_steps):
            # an output with which x0 has the size of data. If it is clipped, of its bound, and in every second step far
            # beyond: a threshold is no clamp where most elements are beyond 1
            size_of_x0 = 1.0 if clip is None else max(1.0, range_of(clip)) * (1.0 if index % 2 else 8.0)
            x0 = size_of_x0 * torch.randn(shape, dtype=torch.float64, generator=draw, device="cpu")
            m = (x0 - number["p"][index] * x) / number["q"][index]
            scaled, expected_noise, z = loop.scaled(x), noise.clone_state(), None
            if asked is not None:
                z = asked[index]
            elif table.draws is not None and bool(table.draws[index]):
                drawn_in = table.draw_dtypes.get((m.dtype, x.dtype), m.dtype)
                z = torch.randn(shape, dtype=drawn_in, generator=expected_noise, device="cpu").to(m.dtype)
            if table.learned is not None:
                m = torch.cat((m, torch.randn(shape, dtype=torch.float64, generator=draw, device="cpu")), 1)
            expected = loop.step(m, x).double()
            m = table.folded(index, x, m, z)
            found, carried = table.step(index, x, m, carried, z)
            # x0 is a small difference of large numbers where there is much noise
            largest_x = _largest(x)
            size = max(_largest(expected), largest_x, abs(number["alpha_next"][index] * number["p"][index]) * largest_x)
            difference = max(_largest(found - expected), _largest(scaled - number["input_scale"][index] * x))
            # float32 rounding inside the scheduler is allowed for; an unknown option gives far larger differences
            close = math.isfinite(size) and difference <= 4e-6 * max(1.0, size)
            same = asked is not None or torch.equal(noise.get_state(), expected_noise.get_state())
            if not (close and same):
                raise refused(
                    scheduler,
                    f"it steps differently from its table: step {index} of {table.num_steps} is off by "
                    f"{difference:.2g}. "
                    "An option in its config, or a changed step(), is not supported",
                )
            x = expected


def _largest(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, math.inf))
