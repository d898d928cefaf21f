"""What is timed end to end: samplers by name, each ready to be called as its users call it.

    digits    the bundled, trained pipeline, latents of 4 x 8 x 8, float32
    policy    a robot policy's 1-D network through `srds_fast.sample`, 16 actions of 7 dimensions, float32
    sd15      a StableDiffusionPipeline of Stable Diffusion 1.5's size, 512 x 512, float16
    sdxl      a StableDiffusionXLPipeline of its size, 1024 x 1024, float16
    dit       a DiTPipeline with a DiT-XL/2, 256 x 256, float16

All but digits have random weights: times do not depend on them, how methods converge does. Text is given embedded and
no image is decoded, which would cost all loops alike. On the CPU networks are small; that of digits is always itself.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

import srds_fast
from srds_fast import zoo
from srds_fast.planner.choose import choose
from srds_fast.planner.plan import Plan
from srds_fast.planner.settings import Settings

from . import demonstrations, rows
from .problems import Problem
from .rows import DEVICE, PolicyNetwork

SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
GUIDANCE = 5.0
# samples of a workload that are not the same: prompts, observations, noise
SAMPLES = 16


class Ran(NamedTuple):
    """What a loop reports of its last call.

    Attributes:
        engine: that ran its waves.
        reason: why it was no faster one, or None.
        method: that ran.
        waves, rows, peak_rows: it ran.
        left_out: what was asked for and could not be had.
    """

    engine: str
    reason: str | None
    method: str
    waves: int
    rows: int
    peak_rows: int
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loop:
    """One way to make a call.

    Attributes:
        call: makes it and returns the sample, [1, ...]; of which one of the workload's samples, 0 if not told.
        ran: what the last one was.
        widths: -> rows of each of its waves, as planned.
    """

    call: Callable[..., Tensor]
    ran: Callable[[], Ran]
    widths: Callable[[], list[int]]


class Workload(ABC):
    """A sampler, ready to be called, one sample at a time.

    Attributes:
        network: what it calls; rows of it are timed on their own.
        problem: its samples as arguments of `srds_fast.sample`, where its weights are trained; None where they are
            random, and how far a method is from the sequential sample means nothing.
    """

    network: rows.Case
    problem: Problem | None = None

    @abstractmethod
    def stock(self, steps: int, network: Any = None) -> Loop:
        """The loop without us, of so many steps; with another callable in the place of the network."""

    @abstractmethod
    def ours(self, steps: int, settings: dict[str, Any]) -> Loop:
        """A loop of ours: settings of `srds_fast.compile` or `srds_fast.sample`, or a plan."""


class PipelineWorkload(Workload):
    """A pipeline of diffusers with guidance.

    Args:
        network: its UNet or transformer, wrapped.
        pipe: the pipeline.
        arguments: sample -> arguments of its call, but for steps and generator.
        problem: see `Workload`.
    """

    def __init__(
        self,
        network: rows.Case,
        pipe: Any,
        arguments: Callable[[int], dict[str, Any]],
        problem: Problem | None = None,
    ) -> None:
        self.network, self.pipe, self.problem = network, pipe, problem
        self._arguments = arguments
        pipe.to(DEVICE)
        pipe.set_progress_bar_config(disable=True)

    def arguments(self, steps: int, sample: int = 0) -> dict[str, Any]:
        """Of a call of the pipeline, or of one made from its parts."""
        return {
            **self._arguments(sample),
            "num_inference_steps": steps,
            "generator": torch.Generator(DEVICE).manual_seed(sample),
        }

    def stock(self, steps: int, network: Any = None) -> Loop:
        pipe = self.pipe
        if network is not None:
            pipe = copy.copy(pipe)
            setattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer", network)
        return _stock(partial(self.called, pipe, steps), steps)

    def ours(self, steps: int, settings: dict[str, Any]) -> Loop:
        fast = srds_fast.compile(self.pipe, **settings)
        return Loop(
            partial(self.called, fast, steps),
            lambda: _ran(fast.report),
            lambda: _widths(fast.plan_for(**self.arguments(steps))),
        )

    @torch.no_grad()
    def called(self, pipe: Any, steps: int, sample: int = 0) -> Tensor:
        """Call a pipeline of these parts and take its latents."""
        images = pipe(**self.arguments(steps, sample)).images
        latents: Tensor = pipe.vae.decoded if isinstance(pipe.vae, Undecoded) else images
        return latents


class SampledWorkload(Workload):
    """A network without a pipeline, through `srds_fast.sample`. Stock is the scheduler's own loop.

    Args:
        network: takes (x, t, condition).
        x: starting noise of its samples, [samples, ...].
        condition: of its samples, by the name of the network's third argument: [samples, ...].
        scheduler: of diffusers.
        trained: whether the weights are.
    """

    def __init__(
        self, network: rows.Case, x: Tensor, condition: dict[str, Tensor], scheduler: Any, trained: bool = False
    ) -> None:
        self.network = network
        self.samples = Problem(
            "policy", network.network, x.to(DEVICE), {k: v.to(DEVICE) for k, v in condition.items()}, scheduler
        )
        self.problem = self.samples if trained else None

    def stock(self, steps: int, network: Any = None) -> Loop:
        network, scheduler = self.network.network if network is None else network, copy.deepcopy(self.samples.scheduler)

        @torch.no_grad()
        def call(sample: int = 0) -> Tensor:
            one = self.samples.one(sample)
            scheduler.set_timesteps(steps, device=DEVICE)
            state = one.x
            for t in scheduler.timesteps:
                state = scheduler.step(network(state, t[None], **one.cond), t, state).prev_sample
            return state

        return _stock(call, steps)

    def ours(self, steps: int, settings: dict[str, Any]) -> Loop:
        engine = settings["plan"].engine if "plan" in settings else settings.get("engine", "auto")
        kept = {} if engine == "eager" else {"graphs": srds_fast.Graphs()}
        reports: list[Any] = []

        @torch.no_grad()
        def call(sample: int = 0) -> Tensor:
            one = self.samples.one(sample)
            found = srds_fast.sample(
                self.network.network, one.x, one.scheduler, steps, cond=one.cond, **settings, **kept
            )
            reports[:] = [found.report]
            return found.sample

        def widths() -> list[int]:
            return _widths(settings["plan"] if "plan" in settings else choose(steps, Settings(**settings)))

        return Loop(call, lambda: _ran(reports[0]), widths)


class Undecoded(ModelMixin, ConfigMixin):
    """In the place of a VAE, for pipelines that always decode: it keeps the latents it is given."""

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0) -> None:
        super().__init__()
        # pipelines ask their parts for a dtype and a device
        self.parameter = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.decoded: Tensor | None = None

    def decode(self, latents: Tensor) -> DecoderOutput:
        """The latents themselves."""
        self.decoded = latents
        return DecoderOutput(sample=latents)


def _widths(plan: Plan) -> list[int]:
    return [len(positions) for positions in plan.program().positions]


def _stock(call: Callable[..., Tensor], steps: int) -> Loop:
    return Loop(call, lambda: Ran("stock", None, "stock", steps, steps, 1), lambda: [1] * steps)


def _ran(report: Any) -> Ran:
    peak_rows, left_out = max(1, report.peak_rows), tuple(report.left_out)
    return Ran(report.engine, report.engine_reason, report.method, report.waves, report.rows, peak_rows, left_out)


def _random(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def digits() -> PipelineWorkload:
    """The bundled pipeline: ten prompts in turn."""
    network, pipe = rows.digits(), zoo.load("digits").to(DEVICE)
    unet: Any = network.network
    pipe.unet = unet
    known = zoo.prompts("digits")
    prompts = [known[sample % len(known)] for sample in range(SAMPLES)]
    with torch.no_grad():
        text, empty = pipe.encode_prompt(prompts, DEVICE, 1, True, [""] * SAMPLES)
    x = _random((SAMPLES, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size), torch.float32)

    @torch.no_grad()
    def denoiser(x: Tensor, t: Tensor, text: Tensor, empty: Tensor) -> Tensor:
        both = torch.cat([empty, text])
        without, given = unet(torch.cat([x, x]), torch.cat([t, t]), encoder_hidden_states=both).sample.chunk(2)
        guided: Tensor = without + GUIDANCE * (given - without)
        return guided

    def arguments(sample: int) -> dict[str, Any]:
        one = slice(sample, sample + 1)
        return {
            "prompt_embeds": text[one],
            "negative_prompt_embeds": empty[one],
            "latents": x[one],
            "guidance_scale": GUIDANCE,
            "output_type": "latent",
        }

    problem = Problem("digits", denoiser, x, {"text": text, "empty": empty}, pipe.scheduler)
    return PipelineWorkload(network, pipe, arguments, problem)


def stable_diffusion() -> PipelineWorkload:
    """Stable Diffusion 1.5's size; its networks but for the UNet are left out."""
    network = rows.stable_diffusion()
    unet: Any = network.network
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    text = _random((2 * SAMPLES, 77, unet.config.cross_attention_dim), network.dtype)

    def arguments(sample: int) -> dict[str, Any]:
        return {
            "prompt_embeds": text[sample, None],
            "negative_prompt_embeds": text[SAMPLES + sample, None],
            "guidance_scale": GUIDANCE,
            "height": 8 * unet.config.sample_size,
            "width": 8 * unet.config.sample_size,
            "output_type": "latent",
        }

    return PipelineWorkload(network, pipe, arguments)


def stable_diffusion_xl() -> PipelineWorkload:
    """Stable Diffusion XL's size, with the scheduler it comes with; its networks but for the UNet are left out."""
    network = rows.stable_diffusion_xl()
    unet: Any = network.network
    pipe = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )
    text = _random((2 * SAMPLES, 77, unet.config.cross_attention_dim), network.dtype)
    pooled = _random((2 * SAMPLES, rows.SDXL_POOLED), network.dtype, seed=1)

    def arguments(sample: int) -> dict[str, Any]:
        return {
            "prompt_embeds": text[sample, None],
            "negative_prompt_embeds": text[SAMPLES + sample, None],
            "pooled_prompt_embeds": pooled[sample, None],
            "negative_pooled_prompt_embeds": pooled[SAMPLES + sample, None],
            "guidance_scale": GUIDANCE,
            "height": 8 * unet.config.sample_size,
            "width": 8 * unet.config.sample_size,
            "output_type": "latent",
        }

    return PipelineWorkload(network, pipe, arguments)


def dit() -> PipelineWorkload:
    """A DiT-XL/2, a class a sample; nothing decodes."""
    network = rows.dit()
    pipe = DiTPipeline(transformer=network.network, vae=Undecoded(), scheduler=DDIMScheduler(clip_sample=False))

    def arguments(sample: int) -> dict[str, Any]:
        return {"class_labels": [sample], "guidance_scale": GUIDANCE, "output_type": "pt"}

    return PipelineWorkload(network, pipe, arguments)


def policy(trained: PolicyNetwork | None = None) -> SampledWorkload:
    """A robot policy's 1-D network of Diffusion Policy's size; or that of bench/demonstrations.py, trained."""
    network = rows.policy(trained)
    if trained is not None:
        shape = (SAMPLES, demonstrations.ACTIONS, demonstrations.HORIZON)
        seen = demonstrations.observations(SAMPLES, torch.Generator().manual_seed(1))
        noise = _random(shape, torch.float32)
        return SampledWorkload(network, noise, {"observation": seen}, demonstrations.scheduler(), trained=True)
    return SampledWorkload(
        network,
        _random((SAMPLES, 7, rows.HORIZON), torch.float32),
        {"observation": _random((SAMPLES, 64), torch.float32, seed=1)},
        DDIMScheduler(clip_sample=False),
    )


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "digits": digits,
    "policy": policy,
    "sd15": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "dit": dit,
}
