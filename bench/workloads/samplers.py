"""Samplers that are timed end to end, by name; each makes the calls that its users make.

    digits    the bundled, trained pipeline, latents of 4 x 8 x 8, float32
    policy    a robot policy's 1-D network through `srds_fast.sample`, 16 actions of 7 dimensions, float32
    sd15      a StableDiffusionPipeline of Stable Diffusion 1.5's size, 512 x 512, float16
    sdxl      a StableDiffusionXLPipeline of its size, 1024 x 1024, float16
    dit       a DiTPipeline with a DiT-XL/2, 256 x 256, float16

All but digits have random weights: times do not depend on them, convergence does. Nothing is encoded or decoded, which
costs all loops the same. On a CPU the networks are small, except that of digits.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DiTPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

import srds_fast
from srds_fast.planner.choose import choose
from srds_fast.planner.plan import Plan
from srds_fast.planner.settings import Settings

from . import demonstrations, networks, pipelines
from .networks import DEVICE, Network, PolicyNetwork
from .problems import Problem, digits_problem

GUIDANCE = 5.0
# different samples of a workload: prompts, observations, noise
SAMPLES = 16


class Ran(NamedTuple):
    """What a loop reports of its last call.

    Attributes:
        method, engine: that ran.
        waves, rows, peak_rows: it ran.
        reason: why no faster engine ran, or None.
        left_out: what was asked for and could not be had.
    """

    method: str
    engine: str
    waves: int
    rows: int
    peak_rows: int
    reason: str | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loop:
    """One way to make a call.

    Attributes:
        call: sample number (default 0) -> the sample, [1, ...].
        ran: -> what the last call was.
        plan: -> the plan of its calls; None: it has none, and takes one row after another.
    """

    call: Callable[..., Tensor]
    ran: Callable[[], Ran]
    plan: Callable[[], Plan] | None = None

    def widths(self) -> list[int]:
        """Rows of each wave, as planned."""
        if self.plan is None:
            return [1] * self.ran().waves
        return [len(positions) for positions in self.plan().program().positions]


class Workload(ABC):
    """A sampler, called for one sample at a time.

    Attributes:
        network: what it calls.
        problem: its samples as arguments of `srds_fast.sample`; None where weights are random, as differences to the
            sequential sample mean nothing there.
    """

    network: Network
    problem: Problem | None = None

    @abstractmethod
    def stock(self, steps: int, module: Any = None) -> Loop:
        """The loop without this package; module: another callable in place of the network."""

    @abstractmethod
    def ours(self, steps: int, settings: dict[str, Any]) -> Loop:
        """A loop of this package; settings: of `srds_fast.compile` or `srds_fast.sample`, or a plan."""


class PipelineWorkload(Workload):
    """A pipeline of diffusers under guidance.

    Args:
        network: its UNet or transformer.
        pipe: the pipeline.
        arguments: sample -> arguments of its call, but for steps and generator.
        problem: see `Workload`.
    """

    def __init__(
        self, network: Network, pipe: Any, arguments: Callable[[int], dict[str, Any]], problem: Problem | None = None
    ) -> None:
        self.network, self.pipe, self.problem = network, pipe, problem
        self._arguments = arguments
        pipe.to(DEVICE)
        pipe.set_progress_bar_config(disable=True)

    def arguments(self, steps: int, sample: int = 0) -> dict[str, Any]:
        """All arguments of a call."""
        generator = torch.Generator(DEVICE).manual_seed(sample)
        return {**self._arguments(sample), "num_inference_steps": steps, "generator": generator}

    def stock(self, steps: int, module: Any = None) -> Loop:
        pipe = self.pipe
        if module is not None:
            pipe = copy.copy(pipe)
            setattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer", module)
        return one_by_one(partial(self.called, pipe, steps), "stock", steps)

    def ours(self, steps: int, settings: dict[str, Any]) -> Loop:
        fast = srds_fast.compile(self.pipe, **settings)
        return Loop(
            partial(self.called, fast, steps),
            lambda: _ran(fast.report),
            lambda: fast.plan_for(**self.arguments(steps)),
        )

    @torch.no_grad()
    def called(self, pipe: Any, steps: int, sample: int = 0) -> Tensor:
        """The latents of a call of this pipeline, or of one with other parts."""
        images = pipe(**self.arguments(steps, sample)).images
        latents: Tensor = pipe.vae.decoded if isinstance(pipe.vae, Undecoded) else images
        return latents


class SampledWorkload(Workload):
    """A network without a pipeline, through `srds_fast.sample`. Stock is the scheduler's own loop.

    Args:
        network: takes (x, t) and the conditions.
        x: starting noise, [samples, ...].
        cond: conditions by the names of the network's arguments, [samples, ...].
        scheduler: of diffusers.
        trained: whether the weights are.
    """

    def __init__(
        self, network: Network, x: Tensor, cond: dict[str, Tensor], scheduler: Any, trained: bool = False
    ) -> None:
        self.network = network
        on_device = {name: value.to(DEVICE) for name, value in cond.items()}
        self.samples = Problem("policy", network.module, x.to(DEVICE), on_device, scheduler)
        self.problem = self.samples if trained else None

    def stock(self, steps: int, module: Any = None) -> Loop:
        network = self.network.module if module is None else module
        scheduler = copy.deepcopy(self.samples.scheduler)

        @torch.no_grad()
        def call(sample: int = 0) -> Tensor:
            one = self.samples.one(sample)
            scheduler.set_timesteps(steps, device=DEVICE)
            state = one.x
            for t in scheduler.timesteps:
                state = scheduler.step(network(state, t[None], **one.cond), t, state).prev_sample
            return state

        return one_by_one(call, "stock", steps)

    def ours(self, steps: int, settings: dict[str, Any]) -> Loop:
        plan: Plan | None = settings.get("plan")
        engine = plan.engine if plan else settings.get("engine", "auto")
        kept = {} if engine == "eager" else {"graphs": srds_fast.Graphs()}
        reports: list[Any] = []

        @torch.no_grad()
        def call(sample: int = 0) -> Tensor:
            found = self.samples.one(sample).sampled(steps, **settings, **kept)
            reports[:] = [found.report]
            return found.sample

        return Loop(call, lambda: _ran(reports[0]), lambda: plan or choose(steps, Settings(**settings)))


class Undecoded(ModelMixin, ConfigMixin):
    """In place of a VAE, for pipelines that always decode: it keeps the latents it is given."""

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


def one_by_one(call: Callable[..., Tensor], name: str, steps: int) -> Loop:
    """A loop that makes one network call after another."""
    return Loop(call, lambda: Ran(name, name, steps, steps, 1))


def _ran(report: Any) -> Ran:
    counts = report.waves, report.rows, max(1, report.peak_rows)
    return Ran(report.method, report.engine, *counts, report.engine_reason, tuple(report.left_out))


def digits() -> PipelineWorkload:
    """The bundled pipeline: ten prompts in turn."""
    pipe, problem = digits_problem(SAMPLES, GUIDANCE)
    network = networks.digits(pipe.unet)

    def arguments(sample: int) -> dict[str, Any]:
        one = problem.one(sample)
        return {
            "prompt_embeds": one.cond["text"],
            "negative_prompt_embeds": one.cond["empty"],
            "latents": one.x,
            "guidance_scale": GUIDANCE,
            "output_type": "latent",
        }

    return PipelineWorkload(network, pipe, arguments, problem._replace(name="digits"))


def sd15() -> PipelineWorkload:
    """Stable Diffusion 1.5's size."""
    network = networks.sd15()
    return _from_text(network, pipelines.stable_diffusion(network.module))


def sdxl() -> PipelineWorkload:
    """Stable Diffusion XL's size, with the scheduler it comes with."""
    network = networks.sdxl()
    return _from_text(network, pipelines.stable_diffusion_xl(network.module))


def _from_text(network: Network, pipe: Any) -> PipelineWorkload:
    text, size = pipelines.embedded_text(pipe, SAMPLES), 8 * pipe.unet.config.sample_size
    same = {"guidance_scale": GUIDANCE, "height": size, "width": size, "output_type": "latent"}
    return PipelineWorkload(network, pipe, lambda n: {**{name: value[n, None] for name, value in text.items()}, **same})


def dit() -> PipelineWorkload:
    """A DiT-XL/2, another class for each sample."""
    network = networks.dit()
    pipe = DiTPipeline(transformer=network.module, vae=Undecoded(), scheduler=DDIMScheduler(clip_sample=False))

    def arguments(sample: int) -> dict[str, Any]:
        return {"class_labels": [sample], "guidance_scale": GUIDANCE, "output_type": "pt"}

    return PipelineWorkload(network, pipe, arguments)


def policy(trained: PolicyNetwork | None = None) -> SampledWorkload:
    """A robot policy of Diffusion Policy's size with random weights; or a trained one of `demonstrations`."""
    network = networks.policy(trained)
    if trained is not None:
        x = pipelines.random((SAMPLES, demonstrations.ACTIONS, demonstrations.HORIZON))
        cond = {"observation": demonstrations.observations(SAMPLES, torch.Generator().manual_seed(1))}
        return SampledWorkload(network, x, cond, demonstrations.scheduler(), trained=True)
    x = pipelines.random((SAMPLES, 7, networks.HORIZON))
    cond = {"observation": pipelines.random((SAMPLES, 64), seed=1)}
    return SampledWorkload(network, x, cond, DDIMScheduler(clip_sample=False))


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "digits": digits,
    "policy": policy,
    "sd15": sd15,
    "sdxl": sdxl,
    "dit": dit,
}
