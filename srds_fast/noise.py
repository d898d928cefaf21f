"""The noise of any scheduler of the kind x = alpha * x0 + sigma * eps, as float64 tables.

One function per scheduler family turns a scheduler whose `set_timesteps` has run into a `NoiseTable`; it is found by
class name, so this module imports no diffusers. Every table is checked against the scheduler's own `step` before it is
used: an option this module does not know shows as a difference and is refused.

To add a scheduler, write one function and register it with `@table_for("ItsClassName")`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedScheduler


@dataclass(frozen=True)
class NoiseTable:
    """Alphas, sigmas and prediction of N steps; every tensor is float64 on the CPU, of shape [N], but `timesteps`.

    Step i departs from (alpha[i], sigma[i]), where the network is evaluated, and arrives at (alpha_next[i],
    sigma_next[i]). The two are kept apart because some schedulers do not arrive where the next step departs: DDIM with
    "trailing" spacing lands on t - T // N and departs again from the next rounded timestep.

    From the network output m at x: x0 = p * x + q * m (then clamped to +-clip, if set), eps = r * x + s * m, and the
    sampler's step is x' = alpha_next * x0 + sigma_next * eps.

    Attributes:
        timesteps: [N], what the network is given, in the scheduler's own dtype and unit.
        input_scale: [N], the network sees input_scale * x (EulerDiscrete's scale_model_input).
        clip: bound of the predicted x0, or None.
        clip_epsilon: derive eps anew from the clamped x0 (DDIM's use_clipped_model_output).
        init_noise_sigma: standard deviation of the starting noise.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor
    p: Tensor
    q: Tensor
    r: Tensor
    s: Tensor
    input_scale: Tensor
    clip: float | None
    init_noise_sigma: float
    clip_epsilon: bool = False

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def step(self, index: int, x: Tensor, m: Tensor) -> Tensor:
        """The sampler's step `index`, written as the definition reads. x, m and the result: any one shape.

        This is the reference that the coefficient form in `steps` is tested against; the solvers do not call it.
        """
        alpha, sigma, arrive_alpha, arrive_sigma, p, q, r, s = (
            float(column[index])
            for column in (
                self.alpha, self.sigma, self.alpha_next, self.sigma_next, self.p, self.q, self.r, self.s,
            )
        )  # fmt: skip
        x0, eps = p * x + q * m, r * x + s * m
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
            if self.clip_epsilon:
                eps = (x - alpha * x0) / sigma
        return arrive_alpha * x0 + arrive_sigma * eps


Builder = Callable[[Any], NoiseTable]
_BUILDERS: dict[str, Builder] = {}

# what to write instead, for schedulers whose step needs history, fresh noise or several network calls
_REPLACEMENTS = {
    "FlowMatchHeunDiscreteScheduler": "FlowMatchEulerDiscreteScheduler",
    "FlowMatchLCMScheduler": "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2DiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler": "EulerDiscreteScheduler",
    "LMSDiscreteScheduler": "EulerDiscreteScheduler",
}


def table_for(*class_names: str) -> Callable[[Builder], Builder]:
    """Register a builder for scheduler classes of these names and their subclasses."""

    def register(builder: Builder) -> Builder:
        _BUILDERS.update(dict.fromkeys(class_names, builder))
        return builder

    return register


def supported_schedulers() -> list[str]:
    """Class names with a builder."""
    return sorted(_BUILDERS)


def noise_table(scheduler: Any, *, clip_epsilon: bool = False) -> NoiseTable:
    """Table of a scheduler whose `set_timesteps` has run, checked against its own `step`.

    The scheduler is not changed: the check runs on a copy and draws from its own generator. Tables are remembered by
    what they depend on, so that the calls of one pipeline check its scheduler once per number of steps.

    Args:
        scheduler: a diffusers scheduler, or one that looks like it.
        clip_epsilon: as DDIM's `use_clipped_model_output`.

    Raises:
        UnsupportedScheduler: no builder for its class, a refused option, or a step that differs from the table.
    """
    key = _fingerprint(scheduler, clip_epsilon)
    table = _checked.get(key)
    if table is None:
        table = _build(scheduler, clip_epsilon)
        for oldest in list(_checked)[: max(0, len(_checked) + 1 - MOST_CHECKED)]:
            _checked.pop(oldest, None)
        _checked[key] = table
    return table


# a check runs every step of the scheduler: too slow to repeat in each call
MOST_CHECKED = 64
_checked: dict[Hashable, NoiseTable] = {}


def _fingerprint(scheduler: Any, clip_epsilon: bool) -> Hashable:
    """What a table depends on, by value: class, a step() of its own, config and every tensor."""
    state = vars(scheduler)
    tensors = tuple(
        (name, str(value.dtype), value.cpu().numpy().tobytes())
        for name, value in sorted(state.items())
        if isinstance(value, Tensor)
    )
    options = repr(sorted(scheduler.config.items()))
    return type(scheduler), state.get("step"), options, scheduler.num_inference_steps, tensors, clip_epsilon


def _build(scheduler: Any, clip_epsilon: bool) -> NoiseTable:
    table = _builder(scheduler)(scheduler)
    columns = (table.alpha_next, table.sigma_next, table.p, table.q, table.r, table.s, table.input_scale)
    if not all(bool(column.isfinite().all()) for column in columns):
        raise UnsupportedScheduler(
            f"{type(scheduler).__name__} divides by zero in one of its {table.num_steps} steps. Epsilon prediction "
            "with rescale_betas_zero_snr does, and so does shift_terminal with one step. "
            "Use prediction_type='v_prediction', drop the option, or take more steps."
        )
    if clip_epsilon:
        table = replace(table, clip_epsilon=True)
    _check_against(scheduler, table)
    return table


def check_scheduler(scheduler: Any) -> None:
    """Raise UnsupportedScheduler unless tables can be built for this scheduler; it is not changed.

    Builds a table of ten steps on a copy. A scheduler that needs more than a step count to set its timesteps (dynamic
    shifting) is judged when the table of a real call is built.
    """
    _builder(scheduler)
    trial = copy.deepcopy(scheduler)
    if not trial.config.get("use_dynamic_shifting", False):
        trial.set_timesteps(min(10, int(trial.config.num_train_timesteps)))
        noise_table(trial)


def _builder(scheduler: Any) -> Builder:
    for cls in type(scheduler).__mro__:
        if cls.__name__ in _BUILDERS:
            return _BUILDERS[cls.__name__]
    name = type(scheduler).__name__
    other = _REPLACEMENTS.get(name, "DDIMScheduler")
    raise UnsupportedScheduler(
        f"{name} is not supported. Its step needs history, fresh noise or several network calls, and replacing it "
        f"changes the sample, so that is your choice to make. Write "
        f"`pipe.scheduler = diffusers.{other}.from_config(pipe.scheduler.config)`, or use another of "
        f"{', '.join(supported_schedulers())}."
    )


@table_for("DDIMScheduler")
def ddim(scheduler: Any) -> NoiseTable:
    """Song et al. 2021, eq. (12) with eta = 0: alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t)."""
    config = scheduler.config
    refuse_option(scheduler, "thresholding", False)
    steps_back = config.num_train_timesteps // scheduler.num_inference_steps
    timesteps = scheduler.timesteps.cpu()
    arrive = timesteps - steps_back
    abar_table = scheduler.alphas_cumprod.cpu()
    if int(timesteps.max()) >= len(abar_table):
        raise UnsupportedScheduler(
            f"{type(scheduler).__name__} asks for timestep {int(timesteps.max())}, its noise schedule ends at "
            f"{len(abar_table) - 1}. steps_offset moves the first one out. Take fewer steps, or steps_offset=0."
        )
    abar = abar_table[timesteps]
    abar_next = torch.where(arrive >= 0, abar_table[arrive.clamp(min=0)], scheduler.final_alpha_cumprod.cpu())
    # roots in the scheduler's own float32, then widened: its step computes them so, and a float64 network notices
    alpha, sigma, alpha_next, sigma_next = (part.sqrt().double() for part in (abar, 1 - abar, abar_next, 1 - abar_next))
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    p, q, r, s = {
        "epsilon": (1 / alpha, -sigma / alpha, zero, one),
        "sample": (zero, one, 1 / sigma, -alpha / sigma),
        "v_prediction": (alpha, -sigma, sigma, alpha),
    }[known_prediction(scheduler, "epsilon", "sample", "v_prediction")]
    return NoiseTable(
        timesteps, alpha, sigma, alpha_next, sigma_next, p, q, r, s,
        input_scale=one,
        clip=float(config.clip_sample_range) if config.clip_sample else None,
        init_noise_sigma=float(scheduler.init_noise_sigma),
    )  # fmt: skip


@table_for("EulerDiscreteScheduler")
def euler(scheduler: Any) -> NoiseTable:
    """Karras et al. 2022, algorithm 1 with s_churn = 0: alpha = 1, sigma from the scheduler's own list."""
    sigmas = scheduler.sigmas.cpu()
    sigma, sigma_next = sigmas[:-1].double(), sigmas[1:].double()
    # float32 as in the scheduler, for the reason given in `ddim`
    variance = (sigmas[:-1] ** 2 + 1).double()
    deviation = ((sigmas[:-1] ** 2 + 1) ** 0.5).double()
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    p, q = {
        "epsilon": (one, -sigma),
        "sample": (zero, one),
        "original_sample": (zero, one),
        "v_prediction": (1 / variance, -sigma / deviation),
    }[known_prediction(scheduler, "epsilon", "sample", "original_sample", "v_prediction")]
    return NoiseTable(
        scheduler.timesteps.cpu(), one, sigma, one, sigma_next, p, q, (1 - p) / sigma, -q / sigma,
        input_scale=1 / deviation,
        clip=None,
        init_noise_sigma=float(scheduler.init_noise_sigma),
    )  # fmt: skip


@table_for("FlowMatchEulerDiscreteScheduler")
def flow_match_euler(scheduler: Any) -> NoiseTable:
    """Rectified flow, x = (1 - sigma) * x0 + sigma * eps, the network predicts the velocity eps - x0."""
    refuse_option(scheduler, "stochastic_sampling", False)
    refuse_option(scheduler, "invert_sigmas", False)
    sigmas = scheduler.sigmas.cpu().double()
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    one = torch.ones_like(sigma)
    return NoiseTable(
        scheduler.timesteps.cpu(), 1 - sigma, sigma, 1 - sigma_next, sigma_next, one, -sigma, one, 1 - sigma,
        input_scale=one,
        clip=None,
        init_noise_sigma=1.0,
    )  # fmt: skip


def refuse_option(scheduler: Any, option: str, needed: object) -> None:
    """Raise UnsupportedScheduler, with the line to write, when a config option has another value than `needed`."""
    value = scheduler.config.get(option, needed)
    if value != needed:
        name = type(scheduler).__name__
        raise UnsupportedScheduler(
            f"{name} with {option}={value!r} is not supported. The step is then not an elementwise function of sample "
            f"and network output. Write `pipe.scheduler = diffusers.{name}.from_config(pipe.scheduler.config, "
            f"{option}={needed!r})`."
        )


def known_prediction(scheduler: Any, *known: str) -> str:
    """The scheduler's prediction type, one of `known`."""
    prediction: str = scheduler.config.prediction_type
    if prediction not in known:
        raise UnsupportedScheduler(
            f"{type(scheduler).__name__} with prediction_type={prediction!r} is not supported. "
            f"Known here are {', '.join(known)}. Use a scheduler with one of these."
        )
    return prediction


def _check_against(scheduler: Any, table: NoiseTable) -> None:
    """Compare every step of the table with the scheduler's own, on random samples of the table's own noise level.

    The bound is what float32 rounding inside the scheduler explains; an option that the table does not know is orders
    of magnitude above it.
    """
    trial = copy.deepcopy(scheduler)
    trial.timesteps = trial.timesteps.cpu()
    options = {"use_clipped_model_output": True} if table.clip_epsilon else {}
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64, generator=generator)
    for index in range(table.num_steps):
        x0, eps, m = draw
        x = table.alpha[index] * x0 + table.sigma[index] * eps
        timestep = trial.timesteps[index]
        scaled = trial.scale_model_input(x, timestep) if hasattr(trial, "scale_model_input") else x
        expected = trial.step(m, timestep, x, **options, return_dict=False)[0].double()
        found = table.step(index, x, m)
        size = float(expected.abs().max())
        difference = float((found - expected).abs().max())
        difference = max(difference, float((scaled - table.input_scale[index] * x).abs().max()))
        if not math.isfinite(size) or difference > 4e-6 * max(1.0, size, float(x.abs().max())):
            raise UnsupportedScheduler(
                f"{type(scheduler).__name__} steps differently from what its options say: step {index} of "
                f"{table.num_steps} is off by {difference:.2g}. An option in its config, or a changed step(), is not "
                f"supported. Compare it with `diffusers.{_plain_name(scheduler)}()` and remove the option."
            )


def _plain_name(scheduler: Any) -> str:
    return next(cls.__name__ for cls in type(scheduler).__mro__ if cls.__name__ in _BUILDERS)
