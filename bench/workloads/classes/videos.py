"""Videos: Wan, HunyuanVideo, LTX, CogVideoX and their like."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import CLIPVisionModel

from .case import Case
from .diffusion_images import COG_NOISE
from .parts import (
    IMAGE,
    SD_BETAS,
    SD_NOISE,
    SMALL,
    clip_vision,
    flow,
    flow_unipc,
    frames_of,
    guided,
    heard,
    masks,
    numbers,
    ones,
    picture,
    shifting,
    t5,
    t5_tokenizer,
    vae,
)

# ---- Wan

_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def wan(seed: int = 5, **changes: Any) -> dict[str, Any]:
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    network = diffusers.WanTransformer3DModel(**{**_WAN, **changes})
    return {"transformer": heard(network, seed), "vae": autoencoder, "scheduler": flow_unipc(3.0)}


def wan_2_2() -> dict[str, Any]:
    """Two experts, for the steps above and below a timestep."""
    return {**wan(), "transformer_2": wan(6)["transformer"], "boundary_ratio": 0.875}


def wan_image() -> dict[str, Any]:
    """The first frame is joined to the latents, and its features are attended to."""
    vision = clip_vision(4, CLIPVisionModel)
    image = {"image_encoder": vision["image_encoder"], "image_processor": vision["feature_extractor"]}
    return {**wan(in_channels=36, image_dim=4), **image}


def wan_vace() -> dict[str, Any]:
    network = diffusers.WanVACETransformer3DModel(**_WAN, vace_layers=[0, 1])
    return {**wan(), "transformer": heard(network)}


def sky_reels() -> dict[str, Any]:
    return {**wan(), "transformer": heard(diffusers.SkyReelsV2Transformer3DModel(**_WAN)), "scheduler": flow_unipc(8.0)}


# ---- HunyuanVideo

_HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}


def hunyuan_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )


def hunyuan_video() -> dict[str, Any]:
    network = diffusers.HunyuanVideoTransformer3DModel(**_HUNYUAN, in_channels=4, out_channels=4)
    return {"transformer": heard(network), "vae": hunyuan_vae(), "scheduler": flow(7.0)}


def hunyuan_video_1_5(guider: Any = None) -> dict[str, Any]:
    network = diffusers.HunyuanVideo15Transformer3DModel(
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
    autoencoder = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    guider = guider or diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    return {"transformer": heard(network), "vae": autoencoder, "scheduler": flow(7.0), "guider": guider}


def with_momentum() -> dict[str, Any]:
    """Its guidance keeps an average over the steps."""
    return hunyuan_video_1_5(
        diffusers.AdaptiveProjectedGuidance(guidance_scale=4.0, adaptive_projected_guidance_momentum=-0.5)
    )


# ---- LTX


def ltx() -> dict[str, Any]:
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    autoencoder = diffusers.AutoencoderKLLTXVideo(
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
    return {"transformer": heard(network), "vae": autoencoder, "scheduler": shifting(0.95, 2.05, 0.1)}


def ltx_condition() -> dict[str, Any]:
    return {**ltx(), "scheduler": flow(1.0, shift_terminal=0.1)}


def ltx_2() -> dict[str, Any]:
    """Video and sound are sampled together, by two schedulers."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    network = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=8,
        rope_double_precision=False,
        rope_type="split",
    )
    connector = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    both = {f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in connector.items()}
    connectors = LTX2TextConnectors(
        caption_channels=8,
        text_proj_in_factor=3,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
        **both,
    )
    autoencoder = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        patch_size_t=1,
    )
    audio = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    parts = {"vae": autoencoder, "audio_vae": audio, "vocoder": vocoder, "connectors": heard(connectors)}
    return {"transformer": heard(network), "scheduler": shifting(0.95, 2.05, 0.1), **parts}


# ---- CogVideoX


def cogvideox(in_channels: int = 4) -> dict[str, Any]:
    network = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
    )
    autoencoder = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(**COG_NOISE, snr_shift_scale=1.0)
    return {"transformer": heard(network), "vae": autoencoder, "scheduler": scheduler}


# ---- others


def mochi() -> dict[str, Any]:
    network = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    widths = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    autoencoder = diffusers.AutoencoderKLMochi(**widths, layers_per_block=(1,) * 5)
    return {"transformer": heard(network), "vae": autoencoder, "scheduler": flow(1.0, invert_sigmas=True)}


def allegro() -> dict[str, Any]:
    network = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=32,
    )
    autoencoder = diffusers.AutoencoderKLAllegro(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2)
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**SD_BETAS)
    return {"transformer": heard(network), "vae": autoencoder, "scheduler": scheduler}


def latte() -> dict[str, Any]:
    network = diffusers.LatteTransformer3DModel(
        sample_size=8,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=2,
    )
    parts = {"text_encoder": t5(), "tokenizer": t5_tokenizer(), "vae": vae()}
    return {"transformer": heard(network), "scheduler": diffusers.DDIMScheduler(**SD_NOISE), **parts}


def kandinsky_5(shift: float = 5.0) -> dict[str, Any]:
    """Its loop writes each state into the same tensor."""
    network = diffusers.Kandinsky5Transformer3DModel(
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
    return {"transformer": heard(network), "vae": hunyuan_vae(), "scheduler": flow(shift)}


def kandinsky_5_image() -> dict[str, Any]:
    return {**kandinsky_5(3.0), "vae": vae(levels=4)}


def sana_video() -> dict[str, Any]:
    network = diffusers.SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        rope_max_seq_len=32,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    return {**wan(), "transformer": heard(network), "scheduler": scheduler}


_FRAMES = {**SMALL, "num_frames": 9}
_HUNYUAN_CALL = {
    "prompt_embeds": numbers(1, 12, 16),
    "prompt_attention_mask": ones(1, 12),
    "pooled_prompt_embeds": numbers(1, 8, seed=4),
    "guidance_scale": 6.0,
    "output_type": "latent",
    **_FRAMES,
}
HUNYUAN_1_5 = {
    "prompt_embeds": numbers(1, 9, 16),
    "prompt_embeds_mask": ones(1, 9),
    "prompt_embeds_2": numbers(1, 6, 32),
    "prompt_embeds_mask_2": ones(1, 6),
    "negative_prompt_embeds": numbers(1, 9, 16, seed=2),
    "negative_prompt_embeds_mask": ones(1, 9),
    "negative_prompt_embeds_2": numbers(1, 6, 32, seed=2),
    "negative_prompt_embeds_mask_2": ones(1, 6),
    "output_type": "latent",
    **SMALL,
    "num_frames": 5,
}
KANDINSKY_5 = {
    "prompt_embeds_qwen": numbers(1, 6, 16),
    "prompt_embeds_clip": numbers(1, 8),
    "prompt_cu_seqlens": ones(2).cumsum(0).int() * 6 - 6,
    "negative_prompt_embeds_qwen": numbers(1, 6, 16, seed=2),
    "negative_prompt_embeds_clip": numbers(1, 8, seed=2),
    "negative_prompt_cu_seqlens": ones(2).cumsum(0).int() * 6 - 6,
    "guidance_scale": 5.0,
    "output_type": "latent",
    **IMAGE,
}
_LTX = guided(3.0, **masks(), **IMAGE, num_frames=9)
_LTX_2 = {
    **guided(3.0, 24, **masks(), **IMAGE, num_frames=5),
    "audio_guidance_scale": 4.0,
    "stg_scale": 1.0,
    "audio_stg_scale": 1.0,
    "spatio_temporal_guidance_blocks": [1],
    "modality_scale": 2.0,
    "audio_modality_scale": 2.0,
    "guidance_rescale": 0.3,
    "frame_rate": 25.0,
}
_SANA_VIDEO = {
    **guided(6.0, 8, **masks(), **IMAGE),
    "negative_prompt": None,
    "use_resolution_binning": False,
    "frames": 9,
}

CASES = [
    Case("WanPipeline", wan, guided(**_FRAMES)),
    Case("WanPipeline", wan_2_2, guided(4.0, **_FRAMES, guidance_scale_2=3.0), "2.2"),
    Case("WanPipeline", wan, guided(**_FRAMES), "2.2 with a timestep for each token", {"expand_timesteps": True}),
    Case("WanImageToVideoPipeline", wan_image, guided(**_FRAMES, image=picture(16))),
    Case("WanVideoToVideoPipeline", wan, guided(**SMALL, video=frames_of(9), strength=0.8)),
    Case("WanVACEPipeline", wan_vace, guided(**_FRAMES)),
    Case("SkyReelsV2Pipeline", sky_reels, guided(**_FRAMES)),
    Case("HunyuanVideoPipeline", hunyuan_video, _HUNYUAN_CALL),
    Case("HunyuanVideo15Pipeline", hunyuan_video_1_5, HUNYUAN_1_5),
    Case("HunyuanVideo15Pipeline", with_momentum, HUNYUAN_1_5, "guidance with momentum"),
    Case("LTXPipeline", ltx, _LTX),
    Case("LTXImageToVideoPipeline", ltx, {**_LTX, "image": picture()}),
    Case("LTXConditionPipeline", ltx_condition, {**_LTX, "image": picture()}),
    Case("LTX2Pipeline", ltx_2, _LTX_2),
    Case("CogVideoXPipeline", cogvideox, guided(6.0, **SMALL, num_frames=8)),
    Case("CogVideoXImageToVideoPipeline", lambda: cogvideox(8), guided(6.0, **SMALL, num_frames=8, image=picture(16))),
    Case("CogVideoXVideoToVideoPipeline", cogvideox, guided(6.0, **SMALL, video=frames_of(8), strength=0.8)),
    Case("MochiPipeline", mochi, guided(4.5, **masks(), **SMALL, num_frames=7)),
    Case("AllegroPipeline", allegro, guided(7.5, **masks(), **SMALL, num_frames=8, negative_prompt=None)),
    Case(
        "LattePipeline",
        latte,
        {"prompt": "a fox", **SMALL, "video_length": 2, "output_type": "latent", "clean_caption": False},
    ),
    Case("Kandinsky5T2VPipeline", kandinsky_5, {**KANDINSKY_5, "num_frames": 5}),
    Case("Kandinsky5T2IPipeline", kandinsky_5_image, KANDINSKY_5, attributes={"resolutions": [(32, 32)]}),
    Case("SanaVideoPipeline", sana_video, _SANA_VIDEO),
]
