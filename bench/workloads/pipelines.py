"""Pipelines of diffusers around one network, without text encoders and VAE: text is embedded, nothing is decoded.

If no network is given it is a tiny one: for measuring what happens between two network calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from .networks import DEVICE, sd15_unet, sdxl_unet

SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD_DDIM = {**SD_BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
SD_EULER = {**SD_BETAS, "steps_offset": 1, "timestep_spacing": "leading"}
# of a prompt
TOKENS = 77


def _with_only(kind: Any, **parts: Any) -> Any:
    needed = [each.name for each in inspect.signature(kind).parameters.values() if each.default is each.empty]
    return kind(**{**dict.fromkeys(needed), **parts})


def stable_diffusion(unet: Any = None, scheduler: Any = None) -> diffusers.StableDiffusionPipeline:
    return _with_only(
        diffusers.StableDiffusionPipeline,
        unet=unet or sd15_unet(small=True),
        scheduler=scheduler or diffusers.DDIMScheduler(**SD_DDIM),
        requires_safety_checker=False,
    )


def stable_diffusion_xl(unet: Any = None, scheduler: Any = None) -> diffusers.StableDiffusionXLPipeline:
    return _with_only(
        diffusers.StableDiffusionXLPipeline,
        unet=unet or sdxl_unet(small=True),
        scheduler=scheduler or diffusers.EulerDiscreteScheduler(**SD_EULER),
        add_watermarker=False,
    )


def stable_diffusion_3() -> diffusers.StableDiffusion3Pipeline:
    sizes = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    widths = {"attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}
    transformer = diffusers.SD3Transformer2DModel(**sizes, **widths, joint_attention_dim=64, pooled_projection_dim=64)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _with_only(diffusers.StableDiffusion3Pipeline, transformer=transformer, scheduler=scheduler)


def flux() -> diffusers.FluxPipeline:
    """As schnell, without guidance."""
    sizes = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 4, 8)}
    widths = {"attention_head_dim": 16, "num_attention_heads": 2}
    transformer = diffusers.FluxTransformer2DModel(**sizes, **widths, joint_attention_dim=32, pooled_projection_dim=32)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    return _with_only(diffusers.FluxPipeline, transformer=transformer, scheduler=scheduler)


def ddim_pixels() -> diffusers.DDIMPipeline:
    """Images of 4 x 4 pixels."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    unet = diffusers.UNet2DModel(sample_size=4, block_out_channels=(8, 16), norm_num_groups=4, **blocks)
    return diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())


def network_of(pipe: Any) -> Any:
    """The UNet or transformer of a pipeline."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def embedded_text(pipe: Any, samples: int = 1) -> dict[str, Tensor]:
    """Random embeddings as arguments of a call, [samples, ...], with negative ones where the pipeline is guided."""
    network = network_of(pipe)
    config = network.config
    width = config.get("cross_attention_dim") or config.get("joint_attention_dim")
    pooled = config.get("pooled_projection_dim")
    if isinstance(pipe, diffusers.StableDiffusionXLPipeline):
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    shapes = {"prompt_embeds": (TOKENS, width)} | ({"pooled_prompt_embeds": (pooled,)} if pooled else {})
    both = {name: random((2 * samples, *each), network.dtype, len(each)) for name, each in shapes.items()}
    text = {name: each[:samples] for name, each in both.items()}
    if not isinstance(pipe, diffusers.FluxPipeline):
        text |= {f"negative_{name}": each[samples:] for name, each in both.items()}
    return text


def random(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
