"""Parts of tiny pipelines: real component classes with random weights, made offline, and arguments of calls."""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD_NOISE = {**SD_BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}

# ---- schedulers


def flow(shift: float = 3.0, **options: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **options)


def shifting(base: float, most: float, terminal: float | None = None) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """Shifted by the length of the sequence."""
    return flow(1.0, use_dynamic_shifting=True, base_shift=base, max_shift=most, shift_terminal=terminal)


def flow_unipc(shift: float = 3.0) -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


# ---- text and image encoders


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over single bytes."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer over single printable characters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -3.0) for letter in string.printable if not letter.isspace()]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=77)


def clip(kind: type = CLIPTextModel) -> Any:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return kind(config)


def t5(width: int = 32) -> T5EncoderModel:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), **sizes, pad_token_id=0, eos_token_id=1))


def clip_vision(width: int = 32, kind: type = CLIPVisionModelWithProjection) -> dict[str, Any]:
    """An image encoder and its processor, for images of 32 x 32 pixels."""
    from transformers import CLIPImageProcessor  # it warns of a package that is not needed here

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37, "patch_size": 16}
    config = CLIPVisionConfig(hidden_size=width, projection_dim=width, image_size=32, **sizes)
    return {"image_encoder": kind(config), "feature_extractor": CLIPImageProcessor(crop_size=32, size=32)}


# ---- autoencoders


def vae(levels: int = 2, latent_channels: int = 4, **changes: Any) -> diffusers.AutoencoderKL:
    """With two levels a latent is half as wide as its image, with four an eighth."""
    widths = (8, 16) if levels == 2 else (8,) * levels
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=latent_channels,
        norm_num_groups=4,
        **changes,
    )


def flow_vae(**changes: Any) -> diffusers.AutoencoderKL:
    scaling = {"shift_factor": 0.0609, "scaling_factor": 1.5035}
    return vae(**scaling, use_quant_conv=False, use_post_quant_conv=False, **changes)


# ---- networks

SMALL_UNET = {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 4}
BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def unet(in_channels: int = 4, **changes: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=4,
        norm_num_groups=4,
        **{**SMALL_UNET, **BLOCKS, "cross_attention_dim": 32, **changes},
    )


def pixel_unet(**changes: Any) -> diffusers.UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(in_channels=3, out_channels=3, norm_num_groups=4, **SMALL_UNET, **blocks, **changes)


def heard(network: nn.Module, seed: int = 5) -> Any:
    """The network with numbers in the place of parameters that are all zero: its outputs would tell nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if bool((parameter == 0).all()) or not bool(parameter.isfinite().all()):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


# ---- arguments of calls


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def image(size: int = 32, seed: int = 0) -> Tensor:
    """One image of 4x4 random patches, (1, 3, size, size) in [0, 1]; several prompts take a batch of as many."""
    patches = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(patches, size=size)


def mask(size: int = 32) -> Tensor:
    """A mask that repaints the right half, (1, 1, size, size)."""
    return (torch.arange(size) >= size // 2).float().expand(1, 1, size, size).clone()


def picture(size: int = 32, seed: int = 0) -> Image.Image:
    """The image as PIL has it."""
    return Image.fromarray((image(size, seed)[0].permute(1, 2, 0) * 255).to(torch.uint8).numpy())


def mask_picture(size: int = 32) -> Image.Image:
    return Image.fromarray((mask(size)[0, 0] * 255).to(torch.uint8).numpy())


def frames_of(count: int, size: int = 16) -> list[Image.Image]:
    """A video."""
    return [picture(size, seed) for seed in range(count)]


def guided(scale: float = 5.0, size: int = 32, tokens: int = 16, **more: Any) -> dict[str, Any]:
    """Text as embeddings, [1, tokens, size], with negative ones."""
    embeds = {"prompt_embeds": numbers(1, tokens, size), "negative_prompt_embeds": numbers(1, tokens, size, seed=2)}
    return {**embeds, "guidance_scale": scale, "output_type": "latent", **more}


def masks(tokens: int = 16) -> dict[str, Any]:
    return {"prompt_attention_mask": ones(1, tokens), "negative_prompt_attention_mask": ones(1, tokens)}


IMAGE = {"height": 32, "width": 32}
SMALL = {"height": 16, "width": 16}
TEXT = {"prompt": "a fox", "output_type": "latent"}
