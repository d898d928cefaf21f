"""Pipelines of newer diffusers classes at a tiny size, with random weights and given prompt embeddings.

`PIPELINES` maps a name to a function that makes a pipeline, and to the arguments of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def _spoken(network: nn.Module, seed: int = 5) -> Any:
    """The network with numbers in the place of parameters that are all zero, whose outputs would tell nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if bool((parameter == 0).all()) or not bool(parameter.isfinite().all()):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def _flow(shift: float = 3.0, **options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift, **options)


def _shifting(base: float, most: float, terminal: float) -> FlowMatchEulerDiscreteScheduler:
    return _flow(1.0, use_dynamic_shifting=True, base_shift=base, max_shift=most, shift_terminal=terminal)


def _ready(cls: Any, **parts: Any) -> Any:
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    taken = cls.__init__.__code__.co_varnames
    return tiny.ready(cls(**{name: part for name, part in (absent | parts).items() if name in taken}))


def _wan_network(seed: int = 5) -> Any:
    return _spoken(
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        seed,
    )


def wan(**more: Any) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return _ready(diffusers.WanPipeline, transformer=_wan_network(), vae=vae, scheduler=_flow(7.0), **more)


def wan_2_2() -> Any:
    """Two experts, for the steps above and below a timestep."""
    return wan(transformer_2=_wan_network(6), boundary_ratio=0.875)


def qwen_image() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = _shifting(0.5, 0.9, 0.02)
    return _ready(diffusers.QwenImagePipeline, transformer=_spoken(transformer), vae=vae, scheduler=scheduler)


def ltx() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
    )
    scheduler = _shifting(0.95, 2.05, 0.1)
    return _ready(diffusers.LTXPipeline, transformer=_spoken(transformer), vae=vae, scheduler=scheduler)


def cogvideox() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", **tiny.SD_NOISE)
    return _ready(diffusers.CogVideoXPipeline, transformer=_spoken(transformer), vae=vae, scheduler=scheduler)


def sana() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
    )
    blocks = ("ResBlock", "EfficientViTBlock")
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
    )
    return _ready(diffusers.SanaPipeline, transformer=_spoken(transformer), vae=vae, scheduler=_flow())


def z_image() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    vae = tiny._vae(latent_channels=16, shift_factor=0.1)
    return _ready(diffusers.ZImagePipeline, transformer=_spoken(transformer), vae=vae, scheduler=_flow())


def hunyuan_video_1_5(guider: Any = None) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    guider = guider or diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    parts = {"transformer": _spoken(transformer), "vae": vae, "guider": guider, "scheduler": _flow(7.0)}
    return _ready(diffusers.HunyuanVideo15Pipeline, **parts)


def with_momentum() -> Any:
    """Its guidance keeps an average over the steps."""
    guider = diffusers.AdaptiveProjectedGuidance(guidance_scale=4.0, adaptive_projected_guidance_momentum=-0.5)
    return hunyuan_video_1_5(guider)


def kandinsky_5() -> Any:
    """Its loop writes each state into the same tensor."""
    torch.manual_seed(0)
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    parts = {"transformer": _spoken(transformer), "vae": vae, "scheduler": _flow(5.0)}
    return _ready(diffusers.Kandinsky5T2VPipeline, **parts)


def sdxl_controlnet() -> Any:
    parts = tiny._sdxl()
    controlnet = diffusers.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(8, 16),
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )
    pipe = diffusers.StableDiffusionXLControlNetPipeline(controlnet=_spoken(controlnet), **parts)
    pipe.scheduler = diffusers.EulerDiscreteScheduler(**tiny.SD_BETAS, steps_offset=1)
    return tiny.ready(pipe)


def sd_pag() -> Any:
    """Perturbed-attention guidance: three branches."""
    pipe = diffusers.StableDiffusionPAGPipeline(**tiny.stable_diffusion().components, pag_applied_layers="mid")
    return tiny.ready(pipe)


def flux_inpaint() -> Any:
    """It puts the known part of the image back after every step, with the noise that the next step has."""
    return tiny.ready(diffusers.FluxInpaintPipeline(**tiny.PIPELINES["flux_guidance"][0]().components))


def _picture() -> PIL.Image.Image:
    return PIL.Image.fromarray((np.random.RandomState(0).rand(32, 32, 3) * 255).astype("uint8"))


def _mask() -> PIL.Image.Image:
    known = np.zeros((32, 32), "uint8")
    known[8:24, 8:28] = 255
    return PIL.Image.fromarray(known)


def _guided(scale: float = 5.0, size: int = 32, **more: Any) -> dict[str, Any]:
    embeds = {"prompt_embeds": numbers(1, 16, size), "negative_prompt_embeds": numbers(1, 16, size, seed=2)}
    return {**embeds, "guidance_scale": scale, "output_type": "latent", **more}


_MASKS = {"prompt_attention_mask": ones(1, 16), "negative_prompt_attention_mask": ones(1, 16)}
_VIDEO = {"height": 16, "width": 16, "num_frames": 9}
_IMAGE = {"height": 32, "width": 32}
_QWEN = {
    "prompt_embeds": numbers(1, 7, 16),
    "prompt_embeds_mask": ones(1, 7),
    "negative_prompt_embeds": numbers(1, 5, 16, seed=2),
    "negative_prompt_embeds_mask": ones(1, 5),
    "true_cfg_scale": 4.0,
    "output_type": "latent",
    **_IMAGE,
}
_HUNYUAN = {
    "prompt_embeds": numbers(1, 9, 16),
    "prompt_embeds_mask": ones(1, 9),
    "prompt_embeds_2": numbers(1, 6, 32),
    "prompt_embeds_mask_2": ones(1, 6),
    "negative_prompt_embeds": numbers(1, 9, 16, seed=2),
    "negative_prompt_embeds_mask": ones(1, 9),
    "negative_prompt_embeds_2": numbers(1, 6, 32, seed=2),
    "negative_prompt_embeds_mask_2": ones(1, 6),
    "output_type": "latent",
    **_VIDEO,
    "num_frames": 5,
}
_KANDINSKY = {
    "prompt_embeds_qwen": numbers(1, 6, 16),
    "prompt_embeds_clip": numbers(1, 8),
    "prompt_cu_seqlens": torch.tensor([0, 6], dtype=torch.int32),
    "negative_prompt_embeds_qwen": numbers(1, 6, 16, seed=2),
    "negative_prompt_embeds_clip": numbers(1, 8, seed=2),
    "negative_prompt_cu_seqlens": torch.tensor([0, 6], dtype=torch.int32),
    "guidance_scale": 5.0,
    "output_type": "latent",
    **_IMAGE,
    "num_frames": 5,
}
_TEXT = {"prompt": "a fox", "output_type": "latent", **_IMAGE}
_CONTROL = {**_TEXT, "image": tiny.image(), "guidance_scale": 5.0}
_INPAINT = {**_TEXT, "image": _picture(), "mask_image": _mask(), "strength": 1.0, "max_sequence_length": 16}

PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "wan": (wan, _guided(**_VIDEO)),
    "wan, two videos": (wan, _guided(**_VIDEO, num_videos_per_prompt=2)),
    "wan 2.2": (wan_2_2, _guided(4.0, **_VIDEO, guidance_scale_2=3.0)),
    "qwen-image": (qwen_image, _QWEN),
    "ltx": (ltx, _guided(3.0, **_MASKS, **{**_IMAGE, "num_frames": 9})),
    "cogvideox": (cogvideox, _guided(6.0, **{**_VIDEO, "num_frames": 8})),
    "sana": (sana, _guided(4.5, 8, **_MASKS, **_IMAGE, negative_prompt=None, use_resolution_binning=False)),
    "z-image": (
        z_image,
        {**_TEXT, "prompt": None, "prompt_embeds": [numbers(9, 16)], "negative_prompt_embeds": [numbers(6, 16)]},
    ),
    "hunyuanvideo 1.5": (hunyuan_video_1_5, _HUNYUAN),
    "kandinsky 5": (kandinsky_5, _KANDINSKY),
    "sdxl controlnet": (sdxl_controlnet, _CONTROL),
    "sdxl controlnet, window": (
        sdxl_controlnet,
        {**_CONTROL, "control_guidance_start": 0.2, "control_guidance_end": 0.7},
    ),
    "sd pag": (sd_pag, {**_TEXT, "guidance_scale": 5.0, "pag_scale": 0.9, "pag_adaptive_scale": 0.5}),
    "flux inpaint": (flux_inpaint, _INPAINT),
}
