"""Two small networks that no default was tuned on, trained in a few minutes each on one CPU core.

patches         a UNet over 16 x 16 pixels in colour, trained by the recipe of `srds_fast.zoo.train_digits` on parts of
                the two photographs that scikit-learn brings along; its condition is which photograph
other policy    the network of `demonstrations`, trained with another seed on other motions
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from sklearn.datasets import load_sample_images
from torch import Tensor

from srds_fast import zoo
from srds_fast.zoo.train_digits import Recipe
from srds_fast.zoo.training import averaged, optimise

from . import demonstrations
from .networks import DEVICE, PolicyNetwork, placed
from .problems import Problem, guided

SEED = 7
SIZE, CLASSES = 16, 2
EMPTY = CLASSES  # the class of no condition
PATCH_STEPS, PATCH_BATCH, PATCH_RATE, PATCH_EMA = 1500, 32, 1e-3, 0.995
# parts of a photograph are so many pixels wide, before they are made smaller
CUT = 48
SHAKE = 0.15


def photographs() -> Tensor:
    """Two photographs, [2, 3, 427, 640] in -1..1: a temple in China, and a flower."""
    images = torch.stack([torch.from_numpy(each.copy()) for each in load_sample_images().images])
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def patches(images: Tensor, which: Tensor) -> Tensor:
    """A random part of photograph which[n] each, [n, 3, 16, 16] in -1..1; half of them mirrored."""
    height, width = images.shape[2:]
    found = []
    for photograph in which.tolist():
        top, left = (int(torch.randint(most - CUT + 1, ())) for most in (height, width))
        part = images[photograph, :, top : top + CUT, left : left + CUT]
        found.append(part.flip(-1) if bool(torch.rand(()) < 0.5) else part)
    return torch.nn.functional.interpolate(torch.stack(found), SIZE, mode="area")


def patches_scheduler() -> DDIMScheduler:
    """That of the recipe: the noise schedule of Stable Diffusion 1 and 2, with DDIM's step."""
    found: DDIMScheduler = DDIMScheduler.from_pretrained(Path(zoo.__file__).parent / "digits" / "scheduler")
    return found


def patches_network() -> UNet2DModel:
    """An untrained one."""
    sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(sample_size=SIZE, num_class_embeds=CLASSES + 1, **sizes, **blocks)


def train_patches(steps: int = PATCH_STEPS) -> UNet2DModel:
    """Train for so many steps; the weights returned are a moving average."""
    torch.manual_seed(SEED)
    learner = patches_network()
    scheduler, images, dropout = patches_scheduler(), photographs(), Recipe().caption_dropout

    def loss_of_step() -> Tensor:
        which = torch.randint(CLASSES, (PATCH_BATCH,))
        x0 = patches(images, which)
        which = which.masked_fill(torch.rand(PATCH_BATCH) < dropout, EMPTY)
        times = torch.randint(scheduler.config.num_train_timesteps, (PATCH_BATCH,))
        noise = torch.randn_like(x0)
        predicted = learner(scheduler.add_noise(x0, noise, times), times, class_labels=which).sample
        return torch.nn.functional.mse_loss(predicted, noise)

    average = averaged(learner, PATCH_EMA)
    optimise(learner, loss_of_step, steps, steps, PATCH_RATE, "patches", average)
    trained: UNet2DModel = average.module.eval()
    return trained


def patches_problem(trained: UNet2DModel, samples: int, guidance: float) -> Problem:
    """Samples of both photographs in turn, [samples, 3, 16, 16], float32."""
    unet: Any = placed(trained, torch.float32)

    def network(x: Tensor, t: Tensor, which: Tensor) -> Tensor:
        found: Tensor = unet(x, t, class_labels=which).sample
        return found

    x = torch.randn(samples, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(SEED)).to(DEVICE)
    which = torch.arange(samples, device=DEVICE) % CLASSES
    cond = {"text": which, "empty": torch.full_like(which, EMPTY)}
    return Problem(f"patches, guidance {guidance:g}", guided(network, guidance), x, cond, patches_scheduler())


def other_demonstrations(observation: Tensor, generator: torch.Generator) -> Tensor:
    """One of each observation, [count, actions, horizon]: it waits, early or late jumps to the goal, and shakes.

    The size in an observation is how strongly: the shaking begins in either direction.
    """
    count = len(observation)
    goal, size = (each[..., None] for each in observation.split(demonstrations.ACTIONS, 1))
    late, against = torch.randint(2, (2, count, 1, 1), generator=generator)
    clock = torch.linspace(0, 1, demonstrations.HORIZON)
    begun = 0.2 + 0.4 * late + 0.05 * torch.randn(count, 1, 1, generator=generator)
    gone = torch.sigmoid((clock - begun) / 0.06)
    turns = torch.arange(1, demonstrations.ACTIONS + 1)[:, None] / 3
    shaking = (1 + size) * (1 - 2 * against) * (2 * math.pi * turns * clock).sin()
    found: Tensor = goal * gone + SHAKE * shaking
    return found


def train_other_policy(steps: int = demonstrations.TRAINING_STEPS) -> PolicyNetwork:
    """Train for so many steps, as `demonstrations.train` does."""
    return demonstrations.train(steps, SEED, other_demonstrations)
