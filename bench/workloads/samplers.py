"""Samplers that are timed end to end, by name; each makes the calls that its users make.

    digits    the bundled, trained pipeline, latents of 4 x 8 x 8, float32
    policy    a robot policy's 1-D network through `srds_fast.sample`, 16 actions of 7 dimensions, float32
    sd15      a StableDiffusionPipeline of Stable Diffusion 1.5's size, 512 x 512, float16
    sdxl      a StableDiffusionXLPipeline of its size, 1024 x 1024, float16
    dit       a DiTPipeline with a DiT-XL/2, 256 x 256, float16

All but digits have random weights: times do not depend on them, convergence does. Nothing is encoded or decoded, which
costs all loops the same. On a CPU the networks are tiny, except that of digits.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import srds_fast
from srds_fast import Report
from srds_fast.planner.choose import choose
from srds_fast.planner.plan import Plan
from srds_fast.planner.settings import Settings

from . import demonstrations, networks, pipelines
from .networks import DEVICE, SMALL, PolicyNetwork
from .problems import GUIDANCE, Problem, digits_problem

# different samples of a workload: prompts, observations, noise
SAMPLES = 16


@dataclass(frozen=True)
class Loop:
    """One way to make a call.

    Attributes:
        call: sample number (default 0) -> the sample, [1, ...].
        report: -> that of the last call.
        widths: -> rows of each wave, as planned.
    """

    call: Callable[..., Tensor]
    report: Callable[[], Report]
    widths: Callable[[], list[int]]


class Workload(ABC):
    """A sampler, called for one sample at a time.

    Attributes:
        network: the module that it calls.
        entries: of the network's batch that one row takes: 2 under guidance.
        problem: its samples as arguments of `srds_fast.sample`; None where weights are random, as differences to the
            sequential sample mean nothing there.
    """

    network: nn.Module
    entries: int
    problem: Problem | None = None

    @abstractmethod
    def stock(self, steps: int, module: Any = None) -> Loop:
        """The loop without this package; module: another callable in place of the network."""

    @abstractmethod
    def ours(self, steps: int, settings: dict[str, Any]) -> Loop:
        """A loop of this package; settings: of `srds_fast.compile` or `srds_fast.sample`, or a plan."""

    @property
    def parameters(self) -> int:
        return sum(each.numel() for each in self.network.parameters())

    def network_call(self, rows: int) -> Callable[[], object]:
        """A function that makes one call of so many rows, every entry with its own timestep.

        What it is given is what the stock loop gives to its first call, repeated.
        """
        given: dict[str, Any] = {}
        signature = inspect.signature(self.network.forward)

        def repeated(given: Tensor) -> Tensor:
            return given.repeat(rows, *[1] * (given.dim() - 1)) if given.dim() else given

        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            given.update(tree_map_only(Tensor, repeated, signature.bind(*args, **kwargs).arguments))

        watch = self.network.register_forward_pre_hook(note, with_kwargs=True)
        self.stock(1).call()
        watch.remove()
        given["timestep"] = torch.linspace(1, 999, rows * self.entries, device=DEVICE).long()
        return lambda: self.network(**given)


class PipelineWorkload(Workload):
    """A pipeline of diffusers under guidance.

    Args:
        about: sample -> arguments of its call, but for steps and generator.
    """

    entries = 2

    def __init__(self, pipe: Any, about: Callable[[int], dict[str, Any]], problem: Problem | None = None) -> None:
        self.network, self.pipe, self.about, self.problem = pipelines.network_of(pipe), pipe, about, problem
        pipe.to(DEVICE)
        pipe.set_progress_bar_config(disable=True)

    def arguments(self, steps: int, sample: int = 0) -> dict[str, Any]:
        generator = torch.Generator(DEVICE).manual_seed(sample)
        return {**self.about(sample), "num_inference_steps": steps, "generator": generator}

    def stock(self, steps: int, module: Any = None) -> Loop:
        pipe = copy.copy(self.pipe)
        if module is not None:
            setattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer", module)
        return one_by_one(partial(self.called, pipe, steps), "stock", steps)

    def ours(self, steps: int, settings: dict[str, Any]) -> Loop:
        fast = srds_fast.compile(self.pipe, **settings)
        call = partial(self.called, fast, steps)
        return Loop(call, lambda: fast.report, lambda: _widths(fast.plan_for(**self.arguments(steps))))

    @torch.no_grad()
    def called(self, pipe: Any, steps: int, sample: int = 0) -> Tensor:
        """The latents of a call of this pipeline, or of one with other parts."""
        images = pipe(**self.arguments(steps, sample)).images
        vae = getattr(pipe, "vae", None)
        latents: Tensor = vae.decoded if isinstance(vae, Undecoded) else images
        return latents


class SampledWorkload(Workload):
    """A network without a pipeline, through `srds_fast.sample`. Stock is the scheduler's own loop.

    Args:
        samples: the network, starting noise, conditions by the names of the network's arguments, and a scheduler.
        trained: whether the weights are.
    """

    entries = 1

    def __init__(self, samples: Problem, trained: bool) -> None:
        self.network, self.samples, self.problem = samples.denoiser, samples, samples if trained else None

    def stock(self, steps: int, module: Any = None) -> Loop:
        network = self.network if module is None else module
        scheduler = copy.deepcopy(self.samples.scheduler)

        @torch.no_grad()
        def call(sample: int = 0) -> Tensor:
            one = self.samples.one(sample % len(self.samples.x))
            scheduler.set_timesteps(steps, device=DEVICE)
            state = one.x
            for t in scheduler.timesteps:
                state = scheduler.step(network(state, t[None], **one.cond), t, state).prev_sample
            return state

        return one_by_one(call, "stock", steps)

    def ours(self, steps: int, settings: dict[str, Any]) -> Loop:
        plan = settings["plan"] if "plan" in settings else choose(steps, Settings(**settings))
        kept = {} if plan.engine == "eager" else {"graphs": srds_fast.Graphs()}
        reports: list[Report] = []

        @torch.no_grad()
        def call(sample: int = 0) -> Tensor:
            one = self.samples.one(sample % len(self.samples.x))
            found = one.sampled(steps, generator=torch.Generator().manual_seed(sample), **settings, **kept)
            reports[:] = [found.report]
            return found.sample

        return Loop(call, lambda: reports[0], lambda: _widths(plan))


class Undecoded:
    """In place of a VAE, for pipelines that always decode: it keeps the latents it is given."""

    config = SimpleNamespace(scaling_factor=1.0)
    decoded: Tensor | None = None

    def decode(self, latents: Tensor) -> SimpleNamespace:
        self.decoded = latents
        return SimpleNamespace(sample=latents)


def one_by_one(call: Callable[..., Tensor], name: str, steps: int) -> Loop:
    """A loop that makes one network call after another."""
    report = Report(name, name, "stock", steps, waves=steps, rows=steps, peak_rows=1)
    return Loop(call, lambda: report, lambda: [1] * steps)


def _widths(plan: Plan) -> list[int]:
    return [len(positions) for positions in plan.program().positions]


def digits(batch: int = 1) -> PipelineWorkload:
    """The bundled pipeline: ten prompts in turn, so many in a call."""
    pipe, problem = digits_problem(SAMPLES)

    def arguments(sample: int) -> dict[str, Any]:
        first = sample * batch % SAMPLES
        one = problem.only(slice(first, first + batch))
        text = {"prompt_embeds": one.cond["text"], "negative_prompt_embeds": one.cond["empty"]}
        return {**text, "latents": one.x, "guidance_scale": GUIDANCE, "output_type": "latent"}

    return PipelineWorkload(pipe, arguments, problem._replace(name="digits"))


def _from_text(pipeline: Callable[..., Any], unet: Callable[[bool], Any]) -> PipelineWorkload:
    with DEVICE:
        network = unet(SMALL)
    pipe = pipeline(networks.placed(network))
    text, size = pipelines.embedded_text(pipe, SAMPLES), 8 * pipe.unet.config.sample_size
    same = {"guidance_scale": GUIDANCE, "height": size, "width": size, "output_type": "latent"}
    return PipelineWorkload(pipe, lambda n: {**{name: value[n, None] for name, value in text.items()}, **same})


def dit() -> PipelineWorkload:
    """A DiT-XL/2, another class for each sample."""
    with DEVICE:
        transformer = networks.placed(networks.dit_transformer(SMALL))
    pipe = DiTPipeline(transformer=transformer, vae=Undecoded(), scheduler=DDIMScheduler(clip_sample=False))
    return PipelineWorkload(pipe, lambda n: {"class_labels": [n], "guidance_scale": GUIDANCE, "output_type": "pt"})


def policy(trained: PolicyNetwork | None = None, samples: int = SAMPLES) -> SampledWorkload:
    """A robot policy of Diffusion Policy's size with random weights; or a trained one of `demonstrations`."""
    x = pipelines.random((samples, demonstrations.ACTIONS, demonstrations.HORIZON))
    if trained is None:
        network = PolicyNetwork(widths=(16, 32)) if SMALL else PolicyNetwork()
        observation, scheduler = pipelines.random((samples, 64), seed=1), DDIMScheduler(clip_sample=False)
    else:
        network, scheduler = trained, demonstrations.scheduler()
        observation = demonstrations.observations(samples, torch.Generator().manual_seed(1))
    network = networks.placed(network, torch.float32)
    problem = Problem("policy", network, x, {"observation": observation.to(DEVICE)}, scheduler)
    return SampledWorkload(problem, trained is not None)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "digits": digits,
    "policy": policy,
    "sd15": partial(_from_text, pipelines.stable_diffusion, networks.sd15_unet),
    "sdxl": partial(_from_text, pipelines.stable_diffusion_xl, networks.sdxl_unet),
    "dit": dit,
}
