"""One builder per scheduler class: it turns a scheduler whose `set_timesteps` has run into a `NoiseTable`.

Builders are registered by class name, so this module does not import diffusers. To add a scheduler, write a function
and register it with `@table_for("ItsClassName")`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedScheduler
from .table import NoiseTable

Builder = Callable[..., NoiseTable]
_BUILDERS: dict[str, Builder] = {}

# supported schedulers, each with those of its kind whose step needs a longer history, its own random process or several
# network calls
_REPLACED_BY = {
    "DDIM": ("PNDM", "IPNDM", "LCM", "TCD", "DDIMParallel", "CogVideoXDDIM"),
    "DDPM": ("DDPMParallel",),
    "FlowMatchEulerDiscrete": ("FlowMatchHeunDiscrete", "FlowMatchLCM"),
    "EulerDiscrete": ("HeunDiscrete", "KDPM2Discrete", "LMSDiscrete"),
    "EulerAncestralDiscrete": ("KDPM2AncestralDiscrete", "DPMSolverSDE"),
    "DPMSolverMultistep": ("UniPCMultistep", "DEISMultistep", "DPMSolverSinglestep"),
}


def table_for(*class_names: str) -> Callable[[Builder], Builder]:
    """Register a builder for scheduler classes of these names and their subclasses."""

    def register(builder: Builder) -> Builder:
        _BUILDERS.update(dict.fromkeys(class_names, builder))
        return builder

    return register


def adds_noise(scheduler: Any, eta: float = 0.0) -> bool:
    """Whether the scheduler's steps add fresh noise. eta: of the call; only DDIM takes it."""
    takes_eta = "eta" in inspect.signature(scheduler.step).parameters
    stochastic = ("DDPMScheduler", "EulerAncestralDiscreteScheduler")
    return (takes_eta and eta > 0) or any(cls.__name__ in stochastic for cls in type(scheduler).__mro__)


def builder_of(scheduler: Any) -> tuple[str, Builder]:
    """The supported class of a scheduler, and its builder. Raises UnsupportedScheduler with the line to write."""
    for cls in type(scheduler).__mro__:
        if cls.__name__ in _BUILDERS:
            return cls.__name__, _BUILDERS[cls.__name__]
    name = type(scheduler).__name__
    kind = name.removesuffix("Scheduler")
    other = next((f"{each}Scheduler" for each, replaced in _REPLACED_BY.items() if kind in replaced), None)
    if other is None:
        raise UnsupportedScheduler(
            f"{name} is not supported, nor is any of its kind. Supported are {', '.join(sorted(_BUILDERS))}. "
            "Use one of these if the network was trained for it, or run without srds_fast."
        )
    raise UnsupportedScheduler(
        f"{name} is not supported: its step is not known here. Another scheduler changes the sample, so the choice is "
        f"yours. Write `pipe.scheduler = diffusers.{other}.from_config(pipe.scheduler.config)`."
    )


@table_for("DDIMScheduler")
def ddim(scheduler: Any, eta: float = 0.0) -> NoiseTable:
    """Song et al. 2021, eq. (12) and (16): alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), noise of deviation eta."""
    config, timesteps, abar_table = scheduler.config, scheduler.timesteps.cpu(), scheduler.alphas_cumprod.cpu()
    refuse_option(scheduler, "thresholding", False)
    arrive = timesteps - config.num_train_timesteps // scheduler.num_inference_steps
    if int(timesteps.max()) >= len(abar_table):
        raise UnsupportedScheduler(
            f"{type(scheduler).__name__} asks for timestep {int(timesteps.max())}, but its noise schedule ends at "
            f"{len(abar_table) - 1}. steps_offset moves the first timestep out. Use fewer steps, or steps_offset=0."
        )
    abar = abar_table[timesteps]
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
        clip=float(config.clip_sample_range) if config.clip_sample else None,
        init_noise_sigma=float(scheduler.init_noise_sigma),
        spread=deviation.double() if eta else None,
        draws=torch.ones(len(timesteps), dtype=torch.bool) if eta else None,
    )  # fmt: skip


@table_for("DDPMScheduler")
def ddpm(scheduler: Any) -> NoiseTable:
    """Ho et al. 2020, eq. (6) and (7): the posterior mean c0 * x0 + c1 * x, and its noise."""
    config, timesteps, abar_table = scheduler.config, scheduler.timesteps.cpu(), scheduler.alphas_cumprod.cpu()
    refuse_option(scheduler, "thresholding", False)
    variance_type = config.variance_type
    if variance_type not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise UnsupportedScheduler(
            f"DDPMScheduler with variance_type={variance_type!r} is not supported. The noise of a step then depends "
            "on the network. Write `pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, "
            "variance_type='fixed_small')`."
        )
    before = [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps]
    abar = abar_table[timesteps]
    abar_next = torch.stack([abar_table[t] if t >= 0 else scheduler.one.cpu() for t in before])
    # float32 as in the scheduler, for the reason given in `ddim`
    kept = abar / abar_next
    of_x0 = (abar_next**0.5 * (1 - kept) / (1 - abar)).double()
    of_x = (kept**0.5 * (1 - abar_next) / (1 - abar)).double()
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
        clip=float(config.clip_sample_range) if config.clip_sample else None,
        init_noise_sigma=float(scheduler.init_noise_sigma),
        clip_epsilon=True,
        spread=spread.double() * draws,
        draws=draws,
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
    x0, v = (zero, one), (1 / variance, -sigma / deviation)
    p, q = of_prediction(scheduler, epsilon=(one, -sigma), sample=x0, original_sample=x0, v_prediction=v)
    return NoiseTable(
        scheduler.timesteps.cpu(), one, sigma, one, sigma_next, p, q, (1 - p) / sigma, -q / sigma,
        input_scale=1 / deviation,
        init_noise_sigma=float(scheduler.init_noise_sigma),
    )  # fmt: skip


@table_for("EulerAncestralDiscreteScheduler")
def euler_ancestral(scheduler: Any) -> NoiseTable:
    """Euler with sigma_next split into a deterministic part and fresh noise (k-diffusion's ancestral step, eta = 1)."""
    of_prediction(scheduler, epsilon=(), v_prediction=())
    table = euler(scheduler)
    start, stop = scheduler.sigmas[:-1].cpu(), scheduler.sigmas[1:].cpu()
    up = (stop**2 * (start**2 - stop**2) / start**2) ** 0.5
    down = (stop**2 - up**2) ** 0.5
    return replace(table, sigma_next=down.double(), spread=up.double(), draws=torch.ones(len(up), dtype=torch.bool))


@table_for("DPMSolverMultistepScheduler")
def dpm_solver(scheduler: Any) -> NoiseTable:
    """DPM-Solver++ of order 1 and 2 (Lu et al. 2022, algorithm 2): the second-order term is a momentum of x0."""
    config = scheduler.config
    refuse_option(scheduler, "thresholding", False)
    refuse_option(scheduler, "variance_type", None)
    if config.solver_order > 2:
        refuse_option(scheduler, "solver_order", 2)
    if config.algorithm_type != "dpmsolver++" and (config.algorithm_type != "dpmsolver" or config.solver_order > 1):
        refuse_option(scheduler, "algorithm_type", "dpmsolver++")
    num_steps = len(scheduler.timesteps)
    # float32 as in the scheduler, for the reason given in `ddim`
    nodes = [scheduler._sigma_to_alpha_sigma_t(each) for each in scheduler.sigmas.cpu()]
    alphas, sigmas = (torch.stack(column) for column in zip(*nodes, strict=True))
    width = (alphas.log() - sigmas.log()).diff()
    of_x0 = -alphas[1:] * (torch.exp(-width) - 1.0)
    ratio = torch.cat((width[:1] * 0, width[1:] / width[:-1]))
    if config.solver_type == "midpoint":
        momentum = 0.5 * of_x0 * ratio
    else:
        momentum = alphas[1:] * ((torch.exp(-width) - 1.0) / width + 1.0) * ratio
    alpha, sigma, sigma_next = alphas[:-1].double(), sigmas[:-1].double(), sigmas[1:].double()
    alpha_next = of_x0.double() + sigma_next / sigma * alpha
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    p, q = of_prediction(
        scheduler,
        epsilon=(1 / alpha, -sigma / alpha),
        sample=(zero, one),
        v_prediction=(alpha, -sigma),
        flow_prediction=(one, -scheduler.sigmas[:-1].cpu().double()),
    )
    second = torch.full((num_steps,), config.solver_order == 2)
    second[0] = False
    if config.euler_at_final or (config.lower_order_final and num_steps < 15) or config.final_sigmas_type == "zero":
        second[-1] = False
    return NoiseTable(
        scheduler.timesteps.cpu(), alpha, sigma, alpha_next, sigma_next, p, q, (1 - alpha * p) / sigma,
        -alpha * q / sigma,
        input_scale=one,
        init_noise_sigma=float(scheduler.init_noise_sigma),
        momentum=torch.where(second, momentum.double(), zero) if bool(second.any()) else None,
    )  # fmt: skip


@table_for("FlowMatchEulerDiscreteScheduler")
def flow_match_euler(scheduler: Any) -> NoiseTable:
    """Rectified flow: x = (1 - sigma) * x0 + sigma * eps, and the network predicts the velocity eps - x0."""
    refuse_option(scheduler, "stochastic_sampling", False)
    refuse_option(scheduler, "invert_sigmas", False)
    sigmas = scheduler.sigmas.cpu().double()
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    one = torch.ones_like(sigma)
    return NoiseTable(
        scheduler.timesteps.cpu(), 1 - sigma, sigma, 1 - sigma_next, sigma_next, one, -sigma, one, 1 - sigma,
        input_scale=one,
    )  # fmt: skip


def refuse_option(scheduler: Any, option: str, needed: object) -> None:
    """Raise UnsupportedScheduler, with the line to write, if a config option differs from `needed`."""
    value = scheduler.config.get(option, needed)
    if value != needed:
        name = type(scheduler).__name__
        raise UnsupportedScheduler(
            f"{name} with {option}={value!r} is not supported. The step is then not an elementwise function of sample "
            f"and network output. Write `pipe.scheduler = diffusers.{name}.from_config(pipe.scheduler.config, "
            f"{option}={needed!r})`."
        )


def of_prediction(scheduler: Any, **known: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The columns that are known for the scheduler's prediction type."""
    prediction: str = scheduler.config.prediction_type
    if prediction not in known:
        raise UnsupportedScheduler(
            f"{type(scheduler).__name__} with prediction_type={prediction!r} is not supported. "
            f"Known here are {', '.join(known)}. Use a scheduler with one of these."
        )
    return known[prediction]
