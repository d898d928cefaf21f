"""Pipelines that take no generator."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import DDIMScheduler
from torch import Tensor


class Unseeded(tiny.diffusers.DDIMPipeline):
    """A pipeline that takes no generator, and draws from the global one before its loop."""

    @torch.no_grad()
    def __call__(self, batch_size: int = 1, num_inference_steps: int = 9, output_type: str = "latent") -> Any:
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(batch_size, 3, 16, 16)
        for t in self.progress_bar(self.scheduler.timesteps):
            x = self.scheduler.step(self.output(x, t), t, x, return_dict=False)[0]
        return (x,)

    def output(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t, return_dict=False)[0]


class DrawsInItsLoop(Unseeded):
    """It makes other images with stock too, unless the global generator stands where it stood."""

    def output(self, x: Tensor, t: Tensor) -> Tensor:
        return super().output(x + 0.1 * torch.randn_like(x), t)


def unseeded(cls: type[Unseeded] = Unseeded) -> Any:
    pipe = tiny.ddim(DDIMScheduler(**tiny.SD_NOISE))
    return tiny.ready(cls(pipe.unet, pipe.scheduler))
