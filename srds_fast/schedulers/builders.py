"""Tables of schedulers that clip the predicted x0, and so cannot be read as linear ones are (see `read_table`).

A builder turns a scheduler whose `set_timesteps` has run into a `NoiseTable`. Builders are registered by class name, so
this module does not import diffusers. To add one, write a function and register it with `@table_for("ItsClassName")`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedScheduler
from ..kernels.common.clamping import Clip, Threshold
from .learned_variance import LearnedVariance
from .refusal import refused
from .table import NoiseTable

Builder = Callable[..., NoiseTable]
_BUILDERS: dict[str, Builder] = {}


def table_for(*class_names: str) -> Callable[[Builder], Builder]:
    """Register a builder for scheduler classes of these names and their subclasses."""

    def register(builder: Builder) -> Builder:
        _BUILDERS.update(dict.fromkeys(class_names, builder))
        return builder

    return register


def builder_of(scheduler: Any) -> Builder | None:
    """The builder for a scheduler's class, or for the nearest one that it is a subclass of."""
    return next((_BUILDERS[cls.__name__] for cls in type(scheduler).__mro__ if cls.__name__ in _BUILDERS), None)


def _levels(scheduler: Any, abar_table: Tensor, timesteps: Tensor) -> Tensor:
    """abar_t of each timestep. Raises UnsupportedScheduler if one lies beyond the noise schedule."""
    if int(timesteps.max()) >= len(abar_table):
        raise UnsupportedScheduler(
            f"{type(scheduler).__name__} asks for timestep {int(timesteps.max())}, but its noise schedule ends at "
            f"{len(abar_table) - 1}. steps_offset moves the first timestep out. Use fewer steps, or steps_offset=0."
        )
    return abar_table[timesteps]


@table_for("DDIMScheduler", "DDIMParallelScheduler")
def ddim(scheduler: Any, eta: float = 0.0) -> NoiseTable:
    """Song et al. 2021, eq. (12) and (16): alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), noise of deviation eta."""
    config, timesteps, abar_table = scheduler.config, scheduler.timesteps.cpu(), scheduler.alphas_cumprod.cpu()
    arrive = timesteps - config.num_train_timesteps // scheduler.num_inference_steps
    abar = _levels(scheduler, abar_table, timesteps)
    abar_next = torch.where(arrive >= 0, abar_table[arrive.clamp(min=0)], scheduler.final_alpha_cumprod.cpu())
    # roots in float32, then converted: the scheduler's step does so, and the difference shows in a float64 network
    deviation = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
    levels = (abar, 1 - abar, abar_next, 1 - abar_next - deviation**2)
    alpha, sigma, alpha_next, sigma_next = (level.sqrt().double() for level in levels)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    p, q, r, s = of_prediction(
        scheduler,
        epsilon=(1 / alpha, -sigma / alpha, zero, one),
        sample=(zero, one, 1 / sigma, -alpha / sigma),
        v_prediction=(alpha, -sigma, sigma, alpha),
    )
    return NoiseTable(
        timesteps, alpha, sigma, alpha_next, sigma_next, p, q, r, s,
        input_scale=one,
        clip=clip_of(config),
        init_noise_sigma=float(scheduler.init_noise_sigma),
        spread=deviation.double() if eta else None,
        draws=torch.ones(len(timesteps), dtype=torch.bool, device="cpu") if eta else None,
    )  # fmt: skip


@table_for("DDPMScheduler", "DDPMParallelScheduler")
def ddpm(scheduler: Any) -> NoiseTable:
    """Ho et al. 2020, eq. (6) and (7): the posterior mean c0 * x0 + c1 * x, and its noise."""
    config, timesteps, abar_table = scheduler.config, scheduler.timesteps.cpu(), scheduler.alphas_cumprod.cpu()
    variance_type = config.variance_type
    if variance_type not in ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"):
        raise refused(scheduler, f"variance_type={variance_type!r} is not known")
    before = [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps]
    abar = _levels(scheduler, abar_table, timesteps)
    abar_next = torch.stack([abar_table[t] if t >= 0 else scheduler.one.cpu() for t in before])
    # float32 as in the scheduler, for the reason given in `ddim`
    kept = abar / abar_next
    of_x0 = (abar_next**0.5 * (1 - kept) / (1 - abar)).double()
    of_x = (kept**0.5 * (1 - abar_next) / (1 - abar)).double()
    learned, clip = None, clip_of(config)
    if variance_type == "learned_range":
        small = torch.stack([scheduler._get_variance(t, variance_type="fixed_small") for t in timesteps])
        learned, clip = LearnedVariance(small.log().double(), (1 - kept).log().double(), clip), None
        spread = learned.middle
    else:
        variance = torch.stack([scheduler._get_variance(t) for t in timesteps])
        spread = variance if variance_type == "fixed_small_log" else variance**0.5
    draws = timesteps > 0
    alpha, sigma = abar.sqrt().double(), (1 - abar).sqrt().double()
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    p, q = of_prediction(
        scheduler, epsilon=(1 / alpha, -sigma / alpha), sample=(zero, one), v_prediction=(alpha, -sigma)
    )
    return NoiseTable(
        # c1 * x expressed by x0 and its eps: x = alpha * x0 + sigma * eps
        timesteps, alpha, sigma, of_x0 + of_x * alpha, of_x * sigma, p, q, (1 - alpha * p) / sigma, -alpha * q / sigma,
        input_scale=one,
        clip=clip,
        init_noise_sigma=float(scheduler.init_noise_sigma),
        clip_epsilon=True,
        learned=learned,
        spread=spread.double() * draws,
        draws=draws,
    )  # fmt: skip


def clip_of(config: Any) -> Clip | None:
    """What bounds x0, by a scheduler's config."""
    if config.get("thresholding", False):
        return Threshold(float(config.dynamic_thresholding_ratio), float(config.sample_max_value))
    return float(config.clip_sample_range) if config.clip_sample else None


def of_prediction(scheduler: Any, **known: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The columns that are known for the scheduler's prediction type."""
    prediction: str = scheduler.config.prediction_type
    if prediction not in known:
        raise UnsupportedScheduler(
            f"{type(scheduler).__name__} with prediction_type={prediction!r} is not supported. "
            f"Known here are {', '.join(known)}. Use a scheduler with one of these."
        )
    return known[prediction]
