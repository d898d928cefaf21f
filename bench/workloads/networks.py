"""Networks whose calls are timed, at their real sizes on a GPU; on a CPU small ones of the same kind.

Weights are random (time does not depend on them) but for those of the bundled digits pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from srds_fast import zoo

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = DEVICE.type == "cpu"
DTYPE = torch.float32 if SMALL else torch.float16
# width of SDXL's pooled text embedding, tokens of a prompt
SDXL_POOLED, TOKENS = 1280, 77
# actions in a sample of a policy
HORIZON = 16


@dataclass(frozen=True)
class Network:
    """A network, and what its calls are given.

    Attributes:
        module: in evaluation mode, on `DEVICE`.
        dtype: of its weights and inputs.
        entries: of the batch that one row takes: 2 under guidance.
        inputs: batch -> keyword arguments, on the CPU.
    """

    module: nn.Module
    dtype: torch.dtype
    entries: int
    inputs: Callable[[int], dict[str, Any]]

    def __post_init__(self) -> None:
        # diffusers' own `to` warns about modules to keep in float32, which these networks do not have
        nn.Module.to(self.module, device=DEVICE, dtype=self.dtype).eval()

    @property
    def parameters(self) -> int:
        return sum(each.numel() for each in self.module.parameters())

    def call(self, rows: int) -> Callable[[], object]:
        """A function that makes one call of so many rows, every entry with its own timestep."""
        batch = rows * self.entries
        given = _on_device({**self.inputs(batch), "timestep": torch.linspace(1, 999, batch).long()}, self.dtype)
        return lambda: self.module(**given)


def _on_device(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: _on_device(each, dtype) for name, each in value.items()}
    return value.to(DEVICE, dtype if value.is_floating_point() else value.dtype)


def _guided_unet(
    unet: Any, dtype: torch.dtype, tokens: int = TOKENS, added: Callable[[int], dict[str, Any]] = lambda _: {}
) -> Network:
    """A text-to-image UNet under guidance; added: batch -> further arguments."""
    config = unet.config

    def inputs(batch: int) -> dict[str, Any]:
        return {
            "sample": torch.randn(batch, config.in_channels, config.sample_size, config.sample_size),
            "encoder_hidden_states": torch.randn(batch, tokens, config.cross_attention_dim),
            **added(batch),
        }

    return Network(unet, dtype, 2, inputs)


def digits(unet: Any = None) -> Network:
    """The bundled UNet, latents of 4 x 8 x 8, float32; or another one of its shape."""
    return _guided_unet(zoo.load("digits").unet if unet is None else unet, torch.float32, tokens=16)


def sd15_unet(small: bool) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's, for 512 x 512."""
    config: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    if small:
        config |= {"sample_size": 16, "block_out_channels": (32, 64, 64, 64), "layers_per_block": 1}
        config |= {"norm_num_groups": 8}
    return UNet2DConditionModel(**config)


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
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + SDXL_POOLED,
    }
    if small:
        config |= {
            "sample_size": 16,
            "block_out_channels": (32, 64, 64),
            "layers_per_block": 1,
            "transformer_layers_per_block": (1, 1, 1),
            "attention_head_dim": (2, 4, 4),
            "norm_num_groups": 8,
        }
    return UNet2DConditionModel(**config)


def dit_transformer(small: bool) -> DiTTransformer2DModel:
    """DiT-XL/2, for 256 x 256."""
    return DiTTransformer2DModel(
        num_attention_heads=2 if small else 16,
        attention_head_dim=8 if small else 72,
        num_layers=2 if small else 28,
        in_channels=4,
        out_channels=8,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
    )


def sd15() -> Network:
    with DEVICE:
        return _guided_unet(sd15_unet(SMALL), DTYPE)


def sdxl() -> Network:
    with DEVICE:
        unet = sdxl_unet(SMALL)
    pixels = 8.0 * unet.config.sample_size

    def added(batch: int) -> dict[str, Any]:
        sizes = torch.tensor([pixels, pixels, 0, 0, pixels, pixels]).expand(batch, -1)
        return {"added_cond_kwargs": {"text_embeds": torch.randn(batch, SDXL_POOLED), "time_ids": sizes}}

    return _guided_unet(unet, DTYPE, added=added)


def dit() -> Network:
    with DEVICE:
        transformer = dit_transformer(SMALL)
    size = transformer.config.sample_size

    def inputs(batch: int) -> dict[str, Any]:
        return {"hidden_states": torch.randn(batch, 4, size, size), "class_labels": torch.arange(batch) % 1000}

    return Network(transformer, DTYPE, 2, inputs)


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

    Attributes:
        actions, observation: width of an action and of an observation.
    """

    def __init__(self, actions: int = 7, observation: int = 64, widths: tuple[int, ...] = (256, 512, 1024)) -> None:
        super().__init__()
        self.actions, self.observation = actions, observation
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


def policy(module: PolicyNetwork | None = None) -> Network:
    """A robot policy's network, 16 actions of 7 dimensions, no guidance, float32; or another one of its class."""
    unet = module or (PolicyNetwork(widths=(16, 32)) if SMALL else PolicyNetwork())

    def inputs(batch: int) -> dict[str, Any]:
        x = torch.randn(batch, unet.actions, HORIZON)
        return {"sample": x, "observation": torch.randn(batch, unet.observation)}

    return Network(unet, torch.float32, 1, inputs)


NETWORKS: dict[str, Callable[[], Network]] = {
    "digits": digits,
    "policy": policy,
    "sd15": sd15,
    "sdxl": sdxl,
    "dit": dit,
}
