"""The network of Diffusion Policy (Chi et al. 2023): a UNet over time, conditioned by FiLM.

Written to be a twin of `DiffusionConditionalUnet1d` of LeRobot: the same layers in the same order, with the same names
of parameters and of the settings, so that weights of one load into the other. What handles one handles both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PolicyConfig:
    """Settings, by the names that they have in LeRobot's `DiffusionConfig`.

    Attributes:
        state_dim, action_dim: numbers of an observed state and of an action.
        n_obs_steps: states that the policy sees.
        horizon: actions that it predicts, from the first of those states on.
        n_action_steps: actions that are carried out, from the last of those states on.
        down_dims: channels of each level; each level but the last halves the time.
    """

    state_dim: int
    action_dim: int
    n_obs_steps: int = 2
    horizon: int = 16
    n_action_steps: int = 8
    down_dims: tuple[int, ...] = (512, 1024, 2048)
    kernel_size: int = 5
    n_groups: int = 8
    diffusion_step_embed_dim: int = 128
    use_film_scale_modulation: bool = True
    num_train_timesteps: int = 100
    beta_schedule: str = "squaredcos_cap_v2"
    prediction_type: str = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = 1.0


class SinusoidalEmbedding(nn.Module):
    """Timesteps [n] -> [n, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(torch.arange(half, device=timestep.device) * -(math.log(10_000) / (half - 1)))
        angles = timestep[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ConvBlock(nn.Module):
    """Convolution, group normalisation, Mish; the length stays."""

    def __init__(self, channels_in: int, channels_out: int, config: PolicyConfig) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(channels_in, channels_out, config.kernel_size, padding=config.kernel_size // 2),
            nn.GroupNorm(config.n_groups, channels_out),
            nn.Mish(),
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.block(x)
        return found


class ResidualBlock(nn.Module):
    """Two convolution blocks; between them the condition scales and shifts each channel (FiLM, Perez et al. 2018)."""

    def __init__(self, channels_in: int, channels_out: int, condition: int, config: PolicyConfig) -> None:
        super().__init__()
        self.scales = config.use_film_scale_modulation
        self.conv1 = ConvBlock(channels_in, channels_out, config)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(condition, channels_out * (2 if self.scales else 1)))
        self.conv2 = ConvBlock(channels_out, channels_out, config)
        same = channels_in == channels_out
        self.residual_conv = nn.Identity() if same else nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[n, channels_in, time] and [n, condition] -> [n, channels_out, time]."""
        film = self.cond_encoder(condition)[:, :, None]
        between = self.conv1(x)
        if self.scales:
            scale, shift = film.chunk(2, dim=1)
            between = scale * between + shift
        else:
            between = between + film
        found: Tensor = self.conv2(between) + self.residual_conv(x)
        return found


class ConditionalUnet1d(nn.Module):
    """Predicts the noise in a trajectory of actions."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        width, dims = config.diffusion_step_embed_dim, config.down_dims
        self.diffusion_step_encoder = nn.Sequential(
            SinusoidalEmbedding(width), nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
        )
        condition = width + config.n_obs_steps * config.state_dim

        def block(channels_in: int, channels_out: int) -> ResidualBlock:
            return ResidualBlock(channels_in, channels_out, condition, config)

        def level(channels_in: int, channels_out: int, resample: nn.Module) -> nn.ModuleList:
            return nn.ModuleList([block(channels_in, channels_out), block(channels_out, channels_out), resample])

        steps = list(pairwise((config.action_dim, *dims)))
        self.down_modules = nn.ModuleList(
            level(a, b, nn.Conv1d(b, b, 3, 2, 1) if number < len(dims) else nn.Identity())
            for number, (a, b) in enumerate(steps, 1)
        )
        self.mid_modules = nn.ModuleList([block(dims[-1], dims[-1]), block(dims[-1], dims[-1])])
        # twice the channels: the output of the level on the way down comes beside
        self.up_modules = nn.ModuleList(
            level(2 * b, a, nn.ConvTranspose1d(a, a, 4, 2, 1)) for a, b in reversed(steps[1:])
        )
        self.final_conv = nn.Sequential(ConvBlock(dims[0], dims[0], config), nn.Conv1d(dims[0], config.action_dim, 1))

    def forward(self, x: Tensor, timestep: Tensor, global_cond: Tensor) -> Tensor:
        """[n, horizon, action_dim], [n] and [n, n_obs_steps * state_dim] -> the noise, as the first."""
        condition = torch.cat([self.diffusion_step_encoder(timestep), global_cond], dim=-1)
        x, kept = x.transpose(1, 2), []
        level: Any  # two residual blocks and a change of the length
        for level in self.down_modules:
            first, second, shorter = level
            x = second(first(x, condition), condition)
            kept.append(x)
            x = shorter(x)
        for block in self.mid_modules:
            x = block(x, condition)
        for level in self.up_modules:
            first, second, longer = level
            x = torch.cat([x, kept.pop()], dim=1)
            x = longer(second(first(x, condition), condition))
        found: Tensor = self.final_conv(x).transpose(1, 2)
        return found

    def denoise(self, x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        """`forward` as `srds_fast.sample` calls it; observation: [n, n_obs_steps, state_dim]."""
        found: Tensor = self(x, t, observation.flatten(1))
        return found
