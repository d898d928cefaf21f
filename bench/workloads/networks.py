"""Networks of known pipelines at their real sizes; on a CPU tiny ones of the same kind. Weights are random."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = DEVICE.type == "cpu"
DTYPE = torch.float32 if SMALL else torch.float16
TINY_UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def sd15_unet(small: bool) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's, for 512 x 512."""
    full = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    return UNet2DConditionModel(**(TINY_UNET | {"cross_attention_dim": 32} if small else full))


def sdxl_unet(small: bool) -> UNet2DConditionModel:
    """Stable Diffusion XL's, for 1024 x 1024."""
    config: dict[str, Any] = {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        # six sizes and the pooled text
        "projection_class_embeddings_input_dim": 6 * 256 + 1280,
    }
    if small:
        config = TINY_UNET | {"cross_attention_dim": 64, "addition_time_embed_dim": 8}
        config["projection_class_embeddings_input_dim"] = 6 * 8 + 32
    return UNet2DConditionModel(**config, use_linear_projection=True, addition_embed_type="text_time")


def dit_transformer(small: bool) -> DiTTransformer2DModel:
    """DiT-XL/2, for 256 x 256."""
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2} if small else {}
    return DiTTransformer2DModel(out_channels=8, **config)


def placed(network: Any, dtype: torch.dtype = DTYPE) -> Any:
    """The network, ready to be called on `DEVICE`."""
    # diffusers' own `to` warns about modules to keep in float32, which these networks do not have
    return nn.Module.to(network, device=DEVICE, dtype=dtype).eval()


class _Block(nn.Module):
    """Two convolutions in time; observation and timestep scale and shift what is between them (FiLM)."""

    def __init__(self, channels_in: int, channels_out: int, conditions: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(channels_in, channels_out, 5, padding=2), nn.GroupNorm(8, channels_out))
        self.second = nn.Sequential(nn.Conv1d(channels_out, channels_out, 5, padding=2), nn.GroupNorm(8, channels_out))
        self.film = nn.Linear(conditions, 2 * channels_out)
        self.past = nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        scale, shift = self.film(conditions)[:, :, None].chunk(2, dim=1)
        between = nn.functional.mish(self.first(x)) * (1 + scale) + shift
        out: Tensor = nn.functional.mish(self.second(between)) + self.past(x)
        return out


class PolicyNetwork(nn.Module):
    """A 1-D UNet over a horizon of actions, as Diffusion Policy's (Chi et al. 2023) in shape and size.

    Args:
        actions, observation: width of an action and of an observation.
        widths: channels of each level.
    """

    def __init__(self, actions: int = 7, observation: int = 64, widths: tuple[int, ...] = (256, 512, 1024)) -> None:
        super().__init__()
        self.frequencies = 128
        self.embed = nn.Sequential(nn.Linear(2 * self.frequencies, 256), nn.Mish(), nn.Linear(256, 256))
        conditions = 256 + observation
        ins = (actions, *widths[:-1])
        self.down = nn.ModuleList(_Block(a, b, conditions) for a, b in zip(ins, widths, strict=True))
        self.middle = _Block(widths[-1], widths[-1], conditions)
        self.up = nn.ModuleList(
            _Block(2 * b, a, conditions)
            for a, b in zip(reversed((widths[0], *widths[:-1])), reversed(widths), strict=True)
        )
        self.out = nn.Conv1d(widths[0], actions, 1)

    def forward(self, sample: Tensor, timestep: Tensor, observation: Tensor) -> Tensor:
        """[n, actions, horizon], [n] and [n, observation] -> [n, actions, horizon]."""
        rates = torch.arange(self.frequencies, device=sample.device) * (-9.2 / self.frequencies)
        angles = timestep[:, None].to(sample) * rates.exp().to(sample)
        conditions = torch.cat([self.embed(torch.cat([angles.sin(), angles.cos()], -1)), observation], -1)
        x, kept = sample, []
        for block in self.down:
            x = block(x, conditions)
            kept.append(x)
            x = nn.functional.avg_pool1d(x, 2)
        x = self.middle(x, conditions)
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2)
            x = block(torch.cat([x, kept.pop()], dim=1), conditions)
        out: Tensor = self.out(x)
        return out
