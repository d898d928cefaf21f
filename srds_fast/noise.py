"""The noise of any scheduler of the kind x = alpha * x0 + sigma * eps, as float64 tables.

One function per scheduler family turns a scheduler whose `set_timesteps` has run into a `NoiseTable`; it is found by
class name, so this module imports no diffusers. Every table is checked against the scheduler's own `step` before it is
used: an option this module does not know shows as a difference and is refused.

To add a scheduler, write one function and register it with `@table_for("ItsClassName")`.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedScheduler


@dataclass(frozen=True, eq=False)
class NoiseTable:
    """Alphas, sigmas and prediction of N steps; every tensor is float64 on the CPU, of shape [N], but `timesteps`.

    Step i departs from (alpha[i], sigma[i]), where the network is evaluated, and arrives at (alpha_next[i],
    sigma_next[i]). The two are kept apart because some schedulers do not arrive where the next step departs: DDIM with
    "trailing" spacing lands on t - T // N and departs again from the next rounded timestep.

    From the network output m at x: x0 = p * x + q * m (then clamped to +-clip, if set), eps = r * x + s * m, and the
    sampler's step is

        x' = alpha_next * x0 + sigma_next * eps + momentum * (x0 - x0_prev) + spread * z

    with x0_prev the x0 of the step before (multistep solvers) and z fresh noise (stochastic ones). A stochastic step
    arrives at the noise level sqrt(sigma_next^2 + spread^2).

    Attributes:
        timesteps: [N], what the network is given, in the scheduler's own dtype and unit.
        input_scale: [N], the network sees input_scale * x (EulerDiscrete's scale_model_input).
        clip: bound of the predicted x0, or None.
        clip_epsilon: derive eps anew from the clamped x0 (DDIM's use_clipped_model_output).
        init_noise_sigma: standard deviation of the starting noise.
        momentum: [N], or None where no step looks back.
        spread: [N], or None where no step adds noise.
        draws: [N] bool, the steps that take noise from the generator (even if their spread is 0); goes with `spread`.
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
    momentum: Tensor | None = None
    spread: Tensor | None = None
    draws: Tensor | None = None

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @cached_property
    def numbers(self) -> dict[str, list[float]]:
        """The float64 columns as lists: a number is read from one in a fraction of the time."""
        columns = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "timesteps"}
        return {name: column.tolist() for name, column in columns.items() if isinstance(column, Tensor)}

    def part(self, start: int, stop: int, *, afresh: bool = True) -> NoiseTable:
        """Steps start .. stop - 1 as a table of their own: what img2img and `denoising_end` walk.

        Begun afresh, the first step looks back at nothing, as that of a multistep scheduler which begins there.
        """
        if (start, stop) == (0, self.num_steps):
            return self
        key = start, stop, afresh
        if key not in self._parts:
            self._parts[key] = self._part(*key)
        return self._parts[key]

    @cached_property
    def _parts(self) -> dict[tuple[int, int, bool], NoiseTable]:
        """Parts made before: what solvers remember of a table, they remember by its identity."""
        return {}

    def _part(self, start: int, stop: int, afresh: bool) -> NoiseTable:
        columns: dict[str, Any] = {
            field.name: value[start:stop]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        if "momentum" in columns and afresh:
            columns["momentum"] = columns["momentum"].clone()
            columns["momentum"][:1] = 0.0
        return replace(self, **columns)

    def step(
        self, index: int, x: Tensor, m: Tensor, x0_prev: Tensor | None = None, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sampler's step `index` and its x0, written as the definition reads. All tensors: any one shape.

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
        x = arrive_alpha * x0 + arrive_sigma * eps
        if self.momentum is not None and x0_prev is not None:
            x = x + float(self.momentum[index]) * (x0 - x0_prev)
        if self.spread is not None and z is not None:
            x = x + float(self.spread[index]) * z
        return x, x0


Builder = Callable[..., NoiseTable]
_BUILDERS: dict[str, Builder] = {}

# what to write instead, for schedulers whose step needs a longer history, its own random process or several network
# calls: the supported one of the same kind
_REPLACEMENTS = {
    "PNDMScheduler": "DDIMScheduler",
    "IPNDMScheduler": "DDIMScheduler",
    "LCMScheduler": "DDIMScheduler",
    "TCDScheduler": "DDIMScheduler",
    "DDIMParallelScheduler": "DDIMScheduler",
    "DDPMParallelScheduler": "DDPMScheduler",
    "CogVideoXDDIMScheduler": "DDIMScheduler",
    "FlowMatchHeunDiscreteScheduler": "FlowMatchEulerDiscreteScheduler",
    "FlowMatchLCMScheduler": "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2DiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler": "EulerDiscreteScheduler",
    "UniPCMultistepScheduler": "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler": "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler": "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler": "EulerAncestralDiscreteScheduler",
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


def adds_noise(scheduler: Any, eta: float = 0.0) -> bool:
    """Whether the scheduler's steps add fresh noise. eta: of the call; only DDIM takes it."""
    takes_eta = "eta" in inspect.signature(scheduler.step).parameters
    return (takes_eta and eta > 0) or any(cls.__name__ in STOCHASTIC for cls in type(scheduler).__mro__)


STOCHASTIC = ("DDPMScheduler", "EulerAncestralDiscreteScheduler")


def noise_table(scheduler: Any, *, clip_epsilon: bool = False, eta: float = 0.0) -> NoiseTable:
    """Table of a scheduler whose `set_timesteps` has run, checked against its own `step`.

    The scheduler is not changed: the check runs on a copy and draws from its own generator. Tables are remembered by
    what they depend on, so that the calls of one pipeline check its scheduler once per number of steps.

    Args:
        scheduler: a diffusers scheduler, or one that looks like it.
        clip_epsilon: as DDIM's `use_clipped_model_output`.
        eta: as DDIM's `eta`: 0 deterministic, 1 the noise of DDPM.

    Raises:
        UnsupportedScheduler: no builder for its class, a refused option, or a step that differs from the table.
    """
    key = _fingerprint(scheduler), clip_epsilon, eta
    table = _checked.get(key)
    if table is None:
        table = _build(scheduler, clip_epsilon, eta)
        for oldest in list(_checked)[: max(0, len(_checked) + 1 - MOST_CHECKED)]:
            _checked.pop(oldest, None)
        _checked[key] = table
    return table


# a check runs every step of the scheduler: too slow to repeat in each call
MOST_CHECKED = 64
_checked: dict[Hashable, NoiseTable] = {}


def _fingerprint(scheduler: Any) -> Hashable:
    """What a table depends on, by value: class, a step() of its own, config and every tensor."""
    state = vars(scheduler)
    tensors = tuple(
        (name, str(value.dtype), value.cpu().numpy().tobytes())
        for name, value in sorted(state.items())
        if isinstance(value, Tensor)
    )
    options = repr(sorted(scheduler.config.items()))
    return type(scheduler), state.get("step"), options, scheduler.num_inference_steps, tensors


def _build(scheduler: Any, clip_epsilon: bool, eta: float) -> NoiseTable:
    builder = _builder(scheduler)
    if eta and "eta" not in inspect.signature(builder).parameters:
        raise UnsupportedScheduler(
            f"{type(scheduler).__name__} takes no eta, {eta} was given. The noise of a step is its scheduler's to set. "
            "Leave eta out, or use DDIMScheduler."
        )
    table = builder(scheduler, **({"eta": eta} if eta else {}))
    columns = (table.alpha_next, table.sigma_next, table.p, table.q, table.r, table.s, table.input_scale)
    if not all(bool(column.isfinite().all()) for column in columns):
        raise UnsupportedScheduler(
            f"{type(scheduler).__name__} divides by zero in one of its {table.num_steps} steps. Epsilon prediction "
            "with rescale_betas_zero_snr does, and so does shift_terminal with one step. "
            "Use prediction_type='v_prediction', drop the option, or take more steps."
        )
    if clip_epsilon:
        table = replace(table, clip_epsilon=True)
    _check_against(scheduler, table, eta)
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
    other = _REPLACEMENTS.get(name)
    if other is None:
        raise UnsupportedScheduler(
            f"{name} is not supported, and none of its kind is. Supported are {', '.join(supported_schedulers())}. "
            "Use one of these if the network was trained for it, or run without srds_fast."
        )
    raise UnsupportedScheduler(
        f"{name} is not supported: its step is not one of those known here. Replacing it changes the sample, so that "
        f"is your choice to make. Write `pipe.scheduler = diffusers.{other}.from_config(pipe.scheduler.config)`."
    )


@table_for("DDIMScheduler")
def ddim(scheduler: Any, eta: float = 0.0) -> NoiseTable:
    """Song et al. 2021, eq. (12) and (16): alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), noise of deviation eta."""
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
    deviation = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
    levels = (abar, 1 - abar, abar_next, 1 - abar_next - deviation**2)
    alpha, sigma, alpha_next, sigma_next = (level.sqrt().double() for level in levels)
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
        spread=deviation.double() if eta else None,
        draws=torch.ones(len(timesteps), dtype=torch.bool) if eta else None,
    )  # fmt: skip


@table_for("DDPMScheduler")
def ddpm(scheduler: Any) -> NoiseTable:
    """Ho et al. 2020, eq. (6) and (7): the posterior mean c0 * x0 + c1 * x, and its noise."""
    config = scheduler.config
    refuse_option(scheduler, "thresholding", False)
    variance_type = config.variance_type
    if variance_type not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise UnsupportedScheduler(
            f"DDPMScheduler with variance_type={variance_type!r} is not supported. The noise of a step then depends "
            "on the network. Write `pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, "
            "variance_type='fixed_small')`."
        )
    timesteps = scheduler.timesteps.cpu()
    abar_table = scheduler.alphas_cumprod.cpu()
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
    p, q = {
        "epsilon": (1 / alpha, -sigma / alpha),
        "sample": (zero, one),
        "v_prediction": (alpha, -sigma),
    }[known_prediction(scheduler, "epsilon", "sample", "v_prediction")]
    return NoiseTable(
        # c1 * x in terms of x0 and the eps that goes with it: x = alpha * x0 + sigma * eps
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


@table_for("EulerAncestralDiscreteScheduler")
def euler_ancestral(scheduler: Any) -> NoiseTable:
    """Euler with sigma_next split into a deterministic part and fresh noise (k-diffusion's ancestral step, eta = 1)."""
    known_prediction(scheduler, "epsilon", "v_prediction")
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
    p, q = {
        "epsilon": (1 / alpha, -sigma / alpha),
        "sample": (zero, one),
        "v_prediction": (alpha, -sigma),
        "flow_prediction": (one, -scheduler.sigmas[:-1].cpu().double()),
    }[known_prediction(scheduler, "epsilon", "sample", "v_prediction", "flow_prediction")]

    second = torch.full((num_steps,), config.solver_order == 2)
    second[0] = False
    if config.euler_at_final or (config.lower_order_final and num_steps < 15) or config.final_sigmas_type == "zero":
        second[-1] = False
    return NoiseTable(
        scheduler.timesteps.cpu(), alpha, sigma, alpha_next, sigma_next, p, q, (1 - alpha * p) / sigma,
        -alpha * q / sigma,
        input_scale=one,
        clip=None,
        init_noise_sigma=float(scheduler.init_noise_sigma),
        momentum=torch.where(second, momentum.double(), zero) if bool(second.any()) else None,
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


def _check_against(scheduler: Any, table: NoiseTable, eta: float) -> None:
    """Compare every step of the table with the scheduler's own, on random samples of the table's own noise level.

    The bound is what float32 rounding inside the scheduler explains; an option that the table does not know is orders
    of magnitude above it. A step that takes noise from its generator must be one that the table expects to.
    """
    trial = copy.deepcopy(scheduler)
    trial.timesteps = trial.timesteps.cpu()
    if hasattr(trial, "set_begin_index"):  # a pipeline has set it to where its image enters, and may stand there
        trial.set_begin_index(0)
        trial._step_index = None
    takes = inspect.signature(trial.step).parameters
    known: dict[str, Any] = {"use_clipped_model_output": table.clip_epsilon, "eta": eta}
    options = {name: value for name, value in known.items() if name in takes}
    noise = torch.Generator().manual_seed(1)
    if "generator" in takes:
        options["generator"] = noise
    draw = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0_prev = None
    for index in range(table.num_steps):
        x0, eps, m = draw
        x = table.alpha[index] * x0 + table.sigma[index] * eps
        timestep = trial.timesteps[index]
        scaled = trial.scale_model_input(x, timestep) if hasattr(trial, "scale_model_input") else x
        expected_noise = torch.Generator()
        expected_noise.set_state(noise.get_state())
        z = None
        if table.draws is not None and bool(table.draws[index]):
            z = torch.randn(m.shape, dtype=m.dtype, generator=expected_noise)
        expected = trial.step(m, timestep, x, **options, return_dict=False)[0].double()
        found, x0_prev = table.step(index, x, m, x0_prev, z)
        size = float(expected.abs().max())
        difference = float((found - expected).abs().max())
        difference = max(difference, float((scaled - table.input_scale[index] * x).abs().max()))
        drawn_as_expected = torch.equal(noise.get_state(), expected_noise.get_state())
        close = math.isfinite(size) and difference <= 4e-6 * max(1.0, size, float(x.abs().max()))
        if not (close and drawn_as_expected):
            raise UnsupportedScheduler(
                f"{type(scheduler).__name__} steps differently from what its options say: step {index} of "
                f"{table.num_steps} is off by {difference:.2g}. An option in its config, or a changed step(), is not "
                f"supported. Compare it with `diffusers.{_plain_name(scheduler)}()` and remove the option."
            )


def _plain_name(scheduler: Any) -> str:
    return next(cls.__name__ for cls in type(scheduler).__mro__ if cls.__name__ in _BUILDERS)
