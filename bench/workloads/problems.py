"""Problems that methods are compared on: a trained pipeline under guidance, and a mixture in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

import srds_fast
from srds_fast import zoo
from srds_fast.sampling.rows import draw_noise, state_dtype
from srds_fast.schedulers.table import NoiseTable
from srds_fast.zoo.push_policy import PushPolicy, Sampler

from .networks import DEVICE

# more entries of a network call are no faster on a CPU, and leave its caches
MOST_ENTRIES = 128
NOISE_SEED = 5  # of the noise that steps add, for the whole batch
GREY_LEVEL = 1 / 127.5
GUIDANCE = 5.0


class Problem(NamedTuple):
    """Arguments of `srds_fast.sample`.

    Attributes:
        denoiser: the network, guidance inside.
        x: starting noise, [samples, ...].
        cond: tensors [samples, ...].
    """

    name: str
    denoiser: Callable[..., Tensor]
    x: Tensor
    cond: dict[str, Tensor]
    scheduler: Any

    def only(self, some: slice) -> Problem:
        """Some of its samples."""
        return self._replace(x=self.x[some], cond={name: value[some] for name, value in self.cond.items()})

    def one(self, sample: int) -> Problem:
        return self.only(slice(sample, sample + 1))

    def with_noise(self) -> Problem:
        """The same, with steps of DDPM, which add noise."""
        return self._replace(scheduler=DDPMScheduler.from_config(self.scheduler.config))

    @property
    def adds_noise(self) -> bool:
        return isinstance(self.scheduler, DDPMScheduler)

    def sampled(self, steps: int, **settings: Any) -> srds_fast.SampleResult:
        given = {"cond": self.cond, "generator": torch.Generator().manual_seed(NOISE_SEED), **settings}
        return srds_fast.sample(self.denoiser, self.x, self.scheduler, steps, **given)

    def draws(self, noise: NoiseTable) -> Tensor | None:
        """The noise that the steps of `sampled` add, [N, samples, ...]; None: they add none."""
        dtype = state_dtype(self.x.dtype)
        return draw_noise(noise, self.x, dtype, torch.Generator().manual_seed(NOISE_SEED))

    def sequential(self, steps: int) -> Tensor:
        """The samples that methods are compared with."""
        return self.sampled(steps, method="sequential", engine="eager").sample


def difference(sample: Tensor, reference: Tensor) -> Tensor:
    """Mean absolute difference of each sample in grey levels, [samples] float64 on the CPU."""
    return (sample.double() - reference.double()).abs().flatten(1).mean(1).cpu() / GREY_LEVEL


def guided(network: Callable[[Tensor, Tensor, Tensor], Tensor], guidance: float) -> Callable[..., Tensor]:
    """A denoiser of a network with classifier-free guidance; its conditions are "text" and "empty".

    Args:
        network: (x, t, condition) -> output, each [rows, ...].
        guidance: 1: the network is asked with the condition only.
    """

    @torch.no_grad()
    def some(x: Tensor, t: Tensor, text: Tensor, empty: Tensor) -> Tensor:
        if guidance == 1:
            return network(x, t, text)
        without, given = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([empty, text])).chunk(2)
        return without + guidance * (given - without)

    def denoiser(x: Tensor, t: Tensor, text: Tensor, empty: Tensor) -> Tensor:
        parts = zip(*(each.split(MOST_ENTRIES // 2) for each in (x, t, text, empty)), strict=True)
        return torch.cat([some(*part) for part in parts])

    return denoiser


def digits_problem(samples: int, guidance: float = GUIDANCE) -> tuple[Any, Problem]:
    """The bundled pipeline, and the problem it solves: ten prompts in turn, latents of 4 x 8 x 8, float32."""
    pipe: Any = zoo.load("digits").to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    known = zoo.prompts("digits")
    prompts = [known[sample % len(known)] for sample in range(samples)]
    with torch.no_grad():
        text, empty = pipe.encode_prompt(prompts, DEVICE, 1, True, [""] * samples)

    def network(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        found: Tensor = pipe.unet(x, t, encoder_hidden_states=states).sample
        return found

    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    x = torch.randn(samples, channels, size, size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scheduler, cond = DDIMScheduler.from_config(pipe.scheduler.config), {"text": text, "empty": empty}
    return pipe, Problem(f"digits, guidance {guidance:g}", guided(network, guidance), x, cond, scheduler)


def mixture(samples: int, dimensions: int = 64, components: int = 5, spread: float = 0.3) -> Problem:
    """An isotropic Gaussian mixture: the posterior mean of x0, and with it eps, is in closed form; float64."""
    noise, scheduler = torch.Generator(), DDIMScheduler(clip_sample=False)
    means = torch.randn(components, dimensions, dtype=torch.float64, generator=noise.manual_seed(0))
    x = torch.randn(samples, dimensions, dtype=torch.float64, generator=noise.manual_seed(1))
    table = scheduler.alphas_cumprod.double()

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        abar = table[t][:, None]
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        variance = alpha**2 * spread**2 + sigma**2
        away = x[:, None] - alpha[:, :, None] * means
        weights = (-(away**2).sum(-1) / (2 * variance)).softmax(-1)
        shrink = alpha * spread**2 / variance
        x0 = (weights[:, :, None] * (means + shrink[:, :, None] * away)).sum(1)
        eps: Tensor = (x - alpha * x0) / sigma
        return eps

    return Problem(f"mixture of {components} Gaussians", denoiser, x, {}, scheduler)


def policy_problem(samples: int) -> Problem:
    """The bundled robot policy in states that it meets, with DDPM and the clip that it is trained for; float32."""
    policy = zoo.load("policy").to(DEVICE)
    config = policy.config

    def own(noise: Tensor, observation: Tensor, generators: list[torch.Generator]) -> Tensor:
        return policy.conditional_sample(len(noise), observation.flatten(1), generators, noise)

    observation = torch.cat(states_met(policy, own, samples))
    x = torch.randn(samples, config.horizon, config.action_dim, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return Problem("policy", policy.denoiser, x, {"observation": observation}, policy.noise_scheduler)


def states_met(policy: PushPolicy, sampler: Sampler, count: int) -> list[Tensor]:
    """Observations [1, n_obs_steps, state_dim] from the beginning, the middle and the end of episodes."""
    met: list[Tensor] = []

    def watched(noise: Tensor, observation: Tensor, generators: list[torch.Generator]) -> Tensor:
        met.extend(observation.split(1))
        return sampler(noise, observation, generators)

    policy.episodes(range(1 + count // 4), watched)
    return met[:: max(1, len(met) // count)][:count]
