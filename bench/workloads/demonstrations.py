"""A small diffusion policy, trained in about a minute: synthetic demonstrations, and the network that learns them.

An observation is a goal and the size of an obstacle: a demonstration goes smoothly from zero to the goal and swings out
to either side. Every observation has two kinds of trajectories, and their average is none. Network, noise and
prediction are as in Diffusion Policy (Chi et al. 2023); the network is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from .networks import PolicyNetwork

HORIZON, ACTIONS, OBSERVATION = 16, 7, 8
WIDTHS = (32, 64)
BATCH, RATE, EMA = 32, 2e-3, 0.99
TRAINING_STEPS = 2000
SWING = 0.25


def scheduler() -> DDIMScheduler:
    """As published: 100 noise levels, squared cosine, epsilon, the predicted trajectory clipped to [-1, 1]."""
    return DDIMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=True)


def observations(count: int, generator: torch.Generator) -> Tensor:
    """[count, actions + 1]: a goal in [-0.5, 0.5], and a size in [0, 1]."""
    return torch.rand(count, OBSERVATION, generator=generator) - torch.tensor([0.5] * ACTIONS + [0.0])


def demonstrations(observation: Tensor, generator: torch.Generator) -> Tensor:
    """One of each observation, [count, actions, horizon]: either side, more or less far out, with slow noise."""
    count = len(observation)
    side = torch.randint(2, (count,), generator=generator)[:, None, None]
    goal, size = (each[..., None] for each in observation.split(ACTIONS, 1))
    clock = torch.linspace(0, 1, HORIZON)
    straight = goal * (3 * clock**2 - 2 * clock**3)
    aside = torch.linspace(-1, 1, ACTIONS)[:, None] * (math.pi * clock).sin() ** 2
    swing = SWING * (1 + size) * aside
    ways = straight + swing, straight - swing
    middle = torch.stack(ways).mean(0)
    reach = 1 + 0.1 * torch.randn(count, 1, 1, generator=generator)
    slow = torch.randn(count, ACTIONS, 3, generator=generator)
    noise = torch.nn.functional.interpolate(slow, HORIZON, mode="linear", align_corners=True)
    return middle + reach * (torch.where(side == 0, *ways) - middle) + 0.02 * noise


def _averaged(mean: Tensor, new: Tensor, count: Tensor) -> Tensor:
    return mean.lerp(new, 1 - min(EMA, int(count) / (int(count) + 10)))


def network() -> PolicyNetwork:
    """An untrained one."""
    return PolicyNetwork(ACTIONS, OBSERVATION, WIDTHS)


def train(
    steps: int = TRAINING_STEPS,
    seed: int = 0,
    demonstrated: Callable[[Tensor, torch.Generator], Tensor] = demonstrations,
) -> PolicyNetwork:
    """Train for so many steps with fixed seeds; the weights returned are a moving average.

    Args:
        demonstrated: (observations, generator) -> a trajectory of each, as `demonstrations`.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    learner = network()
    kept = AveragedModel(learner, avg_fn=_averaged)
    optimiser = torch.optim.AdamW(learner.parameters(), lr=RATE, weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    abar = scheduler().alphas_cumprod
    for _ in range(steps):
        observation = observations(BATCH, generator)
        x0, noise = demonstrated(observation, generator), torch.randn(BATCH, ACTIONS, HORIZON, generator=generator)
        t = torch.randint(len(abar), (BATCH,), generator=generator)
        level = abar[t][:, None, None]
        predicted = learner(level.sqrt() * x0 + (1 - level).sqrt() * noise, t, observation)
        loss = torch.nn.functional.mse_loss(predicted, noise)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        kept.update_parameters(learner)
    trained: PolicyNetwork = kept.module.eval()
    return trained
