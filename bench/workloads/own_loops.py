"""Loops that people write without a pipeline, and the same samples by `srds_fast.sample`.

The networks have random weights: these show how a loop is said to `sample`, and are no problems to compare methods on.
The robot policy is in `bench.speed.robot`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet1DModel
from torch import Tensor, nn

import srds_fast

BATCH, STEPS = 2, 20


class Written(NamedTuple):
    """A loop.

    Attributes:
        own: runs the loop. It draws from torch's global generator.
        ours: the same by `sample`, with the settings of a call.
    """

    name: str
    own: Callable[[], Tensor]
    ours: Callable[..., srds_fast.SampleResult]


class Network(nn.Module):
    """A small network with a time input, [rows, 8] -> [rows, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(9, 32), nn.Tanh(), nn.Linear(32, 8))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """t: [rows], of any unit; it is squeezed."""
        found: Tensor = self.layers(torch.cat([x, (t[:, None] / 100).to(x).tanh()], 1))
        return found


def audio() -> Written:
    """Dance Diffusion's 1-D UNet on waveforms [batch, channels, samples], by DPM-Solver++(2M)."""
    torch.manual_seed(0)
    unet = UNet1DModel(
        sample_size=32,
        in_channels=2,
        out_channels=2,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"),
        extra_in_channels=64,
    ).eval()
    noise = torch.randn(BATCH, 2, 32, generator=torch.Generator().manual_seed(1))

    def own() -> Tensor:
        scheduler, x = DPMSolverMultistepScheduler(), noise
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
        return x

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = unet(x, t).sample
        return found

    def ours(**settings: Any) -> srds_fast.SampleResult:
        return srds_fast.sample(denoiser, noise, DPMSolverMultistepScheduler(), STEPS, **settings)

    return Written("audio, Dance Diffusion's UNet", own, ours)


def denoising_diffusion_pytorch(ddim: bool) -> Written:
    """The two loops of that package: they clip x0, and make eps again of it; DDIM draws noise that eta = 0 drops."""
    torch.manual_seed(0)
    network, levels = Network().eval(), 100 if ddim else STEPS
    betas = torch.linspace(1e-3, 0.2, levels, dtype=torch.float64)
    abar = (1 - betas).cumprod(0)
    start = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(1))
    same: dict[str, Any] = {"num_train_timesteps": levels, "trained_betas": betas.tolist(), "clip_sample": True}

    def clean(x: Tensor, t: int) -> Tensor:
        eps = network(x, torch.full((BATCH,), t))
        return ((x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-1, 1).float()

    def by_ddim() -> Tensor:
        x = start
        for t, after in pairwise(torch.linspace(-1, levels - 1, STEPS + 1).int().flip(0).tolist()):
            x0 = clean(x, t)
            eps = (x - abar[t].sqrt() * x0) / (1 - abar[t]).sqrt()
            x = x0
            if after >= 0:
                noise = torch.randn_like(x)
                x = (abar[after].sqrt() * x0 + (1 - abar[after]).sqrt() * eps).float() + 0.0 * noise
        return x

    def by_ddpm() -> Tensor:
        x = start
        for t in reversed(range(levels)):
            before = abar[t - 1] if t else torch.ones_like(abar[0])
            mean = betas[t] * before.sqrt() / (1 - abar[t]) * clean(x, t)
            mean = mean + (1 - before) * (1 - betas[t]).sqrt() / (1 - abar[t]) * x
            variance = (betas[t] * (1 - before) / (1 - abar[t])).clamp(min=1e-20)
            x = (mean + (variance.sqrt() * torch.randn_like(x) if t else 0.0)).float()
        return x

    def ours(**settings: Any) -> srds_fast.SampleResult:
        if not ddim:
            return srds_fast.sample(network, start, DDPMScheduler(**same), STEPS, **settings)
        scheduler = DDIMScheduler(**same, timestep_spacing="trailing")
        settings = {"clip_epsilon": True, "dummy_draws": range(STEPS - 1), **settings}
        return srds_fast.sample(network, start, scheduler, STEPS, **settings)

    return Written(f"denoising-diffusion-pytorch, {'DDIM' if ddim else 'DDPM'}", by_ddim if ddim else by_ddpm, ours)


def edm() -> Written:
    """EDM's deterministic sampler (Karras et al. 2022, algorithm 1): Heun's steps on levels with rho = 7."""
    torch.manual_seed(0)
    network = Network().eval()
    ramp = torch.linspace(0, 1, STEPS, dtype=torch.float64)
    sigmas = torch.cat([(80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, torch.zeros(1)])
    start = 80.0 * torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(1))

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        """EDM's preconditioning, section 5, with data of deviation 0.5."""
        level = sigma[:, None].to(x)
        whole = level**2 + 0.25
        found: Tensor = 0.25 / whole * x + 0.5 * level / whole.sqrt() * network(x / whole.sqrt(), sigma)
        return found

    def own() -> Tensor:
        x = start.double()
        for here, after in pairwise(sigmas):
            slope = (x - denoised(x.float(), here.expand(BATCH))) / here
            there = x + (after - here) * slope
            if after > 0:
                other = (there - denoised(there.float(), after.expand(BATCH))) / after
                there = x + (after - here) * (slope + other) / 2
            x = there
        return x.float()

    def ours(**settings: Any) -> srds_fast.SampleResult:
        return srds_fast.sample(denoised, start, sigmas=sigmas, sampler="heun", **settings)

    return Written("EDM's sampler", own, ours)


def every_loop() -> list[Written]:
    """All of them."""
    return [audio(), denoising_diffusion_pytorch(True), denoising_diffusion_pytorch(False), edm()]
