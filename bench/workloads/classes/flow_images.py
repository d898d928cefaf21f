"""Images by flow matching: Stable Diffusion 3, Flux, Qwen-Image, Z-Image and their like."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import CLIPTextModelWithProjection

from .case import Case
from .parts import (
    IMAGE,
    SMALL,
    TEXT,
    clip,
    clip_tokenizer,
    flow,
    flow_vae,
    guided,
    heard,
    image,
    mask_picture,
    masks,
    numbers,
    ones,
    picture,
    shifting,
    t5,
    t5_tokenizer,
    vae,
)


def transformer(**changes: Any) -> dict[str, Any]:
    return {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, **changes}


# ---- Stable Diffusion 3

_SD3 = {
    **transformer(num_attention_heads=4),
    "caption_projection_dim": 32,
    "joint_attention_dim": 2 * 32,
    "pooled_projection_dim": 2 * 32,
}


def sd3(channels: int = 4) -> dict[str, Any]:
    sizes = {**_SD3, "in_channels": channels, "out_channels": channels}
    return {
        "transformer": diffusers.SD3Transformer2DModel(**sizes),
        "vae": flow_vae(latent_channels=channels),
        "text_encoder": clip(CLIPTextModelWithProjection),
        "text_encoder_2": clip(CLIPTextModelWithProjection),
        # narrower than both CLIP encoders together it would cut the second off
        "text_encoder_3": t5(2 * 32),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "tokenizer_3": t5_tokenizer(),
        "scheduler": flow(3.0),
    }


def sd3_controlnet() -> dict[str, Any]:
    return {**sd3(), "controlnet": heard(diffusers.SD3ControlNetModel(**{**_SD3, "num_layers": 1}))}


# ---- Flux

_FLUX = {
    "patch_size": 1,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}


def flux(guidance_embeds: bool = False, in_channels: int = 4) -> dict[str, Any]:
    """As schnell, or with embedded guidance as dev; control images and masks are joined to the latents."""
    return {
        "transformer": diffusers.FluxTransformer2DModel(
            **_FLUX,
            in_channels=in_channels,
            out_channels=4,
            pooled_projection_dim=32,
            guidance_embeds=guidance_embeds,
        ),
        "vae": flow_vae(levels=1, latent_channels=1),
        "text_encoder": clip(),
        "text_encoder_2": t5(),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
        "scheduler": flow(3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds),
    }


def flux_dev() -> dict[str, Any]:
    return flux(guidance_embeds=True)


def flux_controlnet() -> dict[str, Any]:
    network = diffusers.FluxControlNetModel(**_FLUX, in_channels=4, pooled_projection_dim=32, guidance_embeds=True)
    return {**flux_dev(), "controlnet": heard(network)}


def flux_2(guidance_embeds: bool = True) -> dict[str, Any]:
    network = diffusers.Flux2Transformer2DModel(
        **{**_FLUX, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4, 4)},
        in_channels=4,
        timestep_guidance_channels=256,
        guidance_embeds=guidance_embeds,
    )
    autoencoder = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return {"transformer": heard(network), "vae": autoencoder, "scheduler": flow(3.0, use_dynamic_shifting=True)}


def chroma() -> dict[str, Any]:
    sizes = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    network = diffusers.ChromaTransformer2DModel(**_FLUX, **sizes, in_channels=4)
    parts = {"text_encoder": t5(), "tokenizer": t5_tokenizer(), "vae": flow_vae(levels=1, latent_channels=1)}
    return {"transformer": heard(network), **parts, "scheduler": flow(1.0, use_dynamic_shifting=True)}


def bria() -> dict[str, Any]:
    network = diffusers.BriaTransformer2DModel(**{**_FLUX, "axes_dims_rope": [0, 4, 4], "attention_head_dim": 8})
    return {"transformer": heard(network), "vae": vae(), "scheduler": flow(1.0, use_dynamic_shifting=True)}


# ---- Qwen-Image

_QWEN_SIZES = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}


def qwen_image(base_dim: int = 24, dim_mult: tuple[int, ...] = (1, 2, 4)) -> dict[str, Any]:
    network = diffusers.QwenImageTransformer2DModel(**_QWEN_SIZES)
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=base_dim,
        z_dim=4,
        dim_mult=list(dim_mult),
        num_res_blocks=1,
        temperal_downsample=[False] * (len(dim_mult) - 2) + [True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return {"transformer": heard(network), "vae": autoencoder, "scheduler": shifting(0.5, 0.9, 0.02)}


def qwen_edit() -> dict[str, Any]:
    """The image to edit is enlarged to a megapixel: its latents are a 32nd as large."""
    return qwen_image(base_dim=1, dim_mult=(1,) * 6)


def qwen_controlnet() -> dict[str, Any]:
    return {**qwen_image(), "controlnet": heard(diffusers.QwenImageControlNetModel(**{**_QWEN_SIZES, "num_layers": 1}))}


# ---- others


def z_image() -> dict[str, Any]:
    network = diffusers.ZImageTransformer2DModel(
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
    autoencoder = vae(latent_channels=16, shift_factor=0.1)
    return {"transformer": heard(network), "vae": autoencoder, "scheduler": flow(3.0)}


_SANA = {
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 4,
    "cross_attention_dim": 8,
    "caption_channels": 8,
}


def sana(**changes: Any) -> dict[str, Any]:
    blocks = ("ResBlock", "EfficientViTBlock")
    autoencoder = diffusers.AutoencoderDC(
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
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    network = diffusers.SanaTransformer2DModel(**_SANA, **changes)
    return {"transformer": heard(network), "vae": autoencoder, "scheduler": scheduler}


def sana_sprint() -> dict[str, Any]:
    # two steps is what it was trained for
    scheduler = diffusers.SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
    return {**sana(guidance_embeds=True, qk_norm="rms_norm_across_heads"), "scheduler": scheduler}


def sana_controlnet() -> dict[str, Any]:
    return {**sana(), "controlnet": heard(diffusers.SanaControlNetModel(**_SANA))}


def aura_flow() -> dict[str, Any]:
    sizes = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "caption_projection_dim": 32, "joint_attention_dim": 32}
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=32, attention_head_dim=8, num_attention_heads=4, pos_embed_max_size=256, **sizes
    )
    return {"transformer": heard(network), "vae": vae(), "scheduler": flow(1.73)}


def lumina_next() -> dict[str, Any]:
    network = diffusers.LuminaNextDiT2DModel(
        sample_size=4,
        hidden_size=24,
        num_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=32,
    )
    return {"transformer": heard(network), "vae": vae(), "scheduler": flow(1.0)}


def lumina_2() -> dict[str, Any]:
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=32,
    )
    return {"transformer": heard(network), "vae": flow_vae(), "scheduler": flow(6.0)}


def hidream() -> dict[str, Any]:
    network = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    return {"transformer": heard(network), "vae": flow_vae(), "scheduler": flow(3.0)}


def cogview_4() -> dict[str, Any]:
    network = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(64, 64),
    )
    scheduler = flow(
        1.0,
        base_shift=0.25,
        max_shift=0.75,
        use_dynamic_shifting=True,
        time_shift_type="linear",
        base_image_seq_len=256,
    )
    return {"transformer": heard(network), "vae": vae(), "scheduler": scheduler}


def prx() -> dict[str, Any]:
    network = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=32, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[4, 4]
    )
    return {"transformer": heard(network), "vae": vae(shift_factor=0.0), "scheduler": flow(3.0)}


_SD3_TEXT = {**TEXT, "guidance_scale": 5.0, "max_sequence_length": 16}
_SD3_CALL = {**_SD3_TEXT, **IMAGE}
_FLUX_TEXT = {**TEXT, **SMALL, "max_sequence_length": 16}
_CONTROL = {"control_image": image(16), "controlnet_conditioning_scale": 0.5}
_FROM_IMAGE = {"image": image(16), "strength": 0.8}
_INPAINT = {"image": picture(16), "mask_image": mask_picture(16), "strength": 1.0}
QWEN = {
    "prompt_embeds": numbers(1, 7, 16),
    "prompt_embeds_mask": ones(1, 7),
    "negative_prompt_embeds": numbers(1, 5, 16, seed=2),
    "negative_prompt_embeds_mask": ones(1, 5),
    "true_cfg_scale": 4.0,
    "output_type": "latent",
    **IMAGE,
}
Z_IMAGE = {
    "prompt_embeds": [numbers(9, 16)],
    "negative_prompt_embeds": [numbers(6, 16, seed=2)],
    "output_type": "latent",
    **IMAGE,
}
_SANA_CALL = guided(4.5, 8, **masks(), **IMAGE, negative_prompt=None, use_resolution_binning=False)
_SPRINT = {
    "prompt_embeds": numbers(1, 16, 8),
    "prompt_attention_mask": ones(1, 16),
    "intermediate_timesteps": None,
    "use_resolution_binning": False,
    "output_type": "latent",
    **IMAGE,
}
_HIDREAM = {
    "prompt_embeds_t5": numbers(1, 16, 32),
    "negative_prompt_embeds_t5": numbers(1, 16, 32, seed=2),
    "prompt_embeds_llama3": numbers(2, 1, 16, 16),
    "negative_prompt_embeds_llama3": numbers(2, 1, 16, 16, seed=2),
    "pooled_prompt_embeds": numbers(1, 64),
    "negative_pooled_prompt_embeds": numbers(1, 64, seed=2),
    "guidance_scale": 5.0,
    "output_type": "latent",
    **IMAGE,
}

CASES = [
    Case("StableDiffusion3Pipeline", sd3, _SD3_CALL),
    Case("StableDiffusion3Img2ImgPipeline", sd3, {**_SD3_TEXT, "image": image(), "strength": 0.8}),
    Case(
        "StableDiffusion3InpaintPipeline",
        lambda: sd3(16),
        {**_SD3_CALL, "image": picture(), "mask_image": mask_picture()},
    ),
    Case("StableDiffusion3ControlNetPipeline", sd3_controlnet, {**_SD3_CALL, **_CONTROL, "control_image": image()}),
    Case(
        "StableDiffusion3PAGPipeline", sd3, {**_SD3_CALL, "pag_scale": 0.9}, options={"pag_applied_layers": "blocks.1"}
    ),
    Case("FluxPipeline", flux, _FLUX_TEXT, "schnell"),
    Case("FluxPipeline", flux_dev, _FLUX_TEXT),
    Case("FluxImg2ImgPipeline", flux_dev, {**_FLUX_TEXT, **_FROM_IMAGE}),
    Case("FluxInpaintPipeline", flux_dev, {**_FLUX_TEXT, **_INPAINT}),
    Case("FluxControlNetPipeline", flux_controlnet, {**_FLUX_TEXT, **_CONTROL}),
    Case("FluxControlPipeline", lambda: flux(True, 8), {**_FLUX_TEXT, "control_image": image(16)}),
    Case(
        "FluxFillPipeline", lambda: flux(True, 12), {**_FLUX_TEXT, "image": picture(16), "mask_image": mask_picture(16)}
    ),
    Case("FluxKontextPipeline", flux_dev, {**_FLUX_TEXT, "image": picture(16), "max_area": 256, "_auto_resize": False}),
    Case("Flux2Pipeline", flux_2, {"prompt_embeds": numbers(1, 8, 16), "output_type": "latent", **SMALL}),
    Case("Flux2KleinPipeline", lambda: flux_2(False), guided(4.0, 16, 8, **SMALL)),
    Case("ChromaPipeline", chroma, {**_FLUX_TEXT, "guidance_scale": 4.0}),
    Case("ChromaImg2ImgPipeline", chroma, {**_FLUX_TEXT, "guidance_scale": 4.0, **_FROM_IMAGE}),
    Case("BriaPipeline", bria, guided(**IMAGE)),
    Case("QwenImagePipeline", qwen_image, QWEN),
    Case("QwenImageImg2ImgPipeline", qwen_image, {**QWEN, "image": picture(), "strength": 0.8}),
    Case("QwenImageInpaintPipeline", qwen_image, {**QWEN, "image": picture(), "mask_image": mask_picture()}),
    Case("QwenImageControlNetPipeline", qwen_controlnet, {**QWEN, **_CONTROL, "control_image": picture()}),
    Case("QwenImageEditPipeline", qwen_edit, {**QWEN, "image": picture(), "height": 256, "width": 256}),
    Case("QwenImageEditPlusPipeline", qwen_edit, {**QWEN, "image": [picture()], "height": 256, "width": 256}),
    Case("ZImagePipeline", z_image, Z_IMAGE),
    Case("ZImageImg2ImgPipeline", z_image, {**Z_IMAGE, "image": picture(), "strength": 0.8}),
    Case("ZImageInpaintPipeline", z_image, {**Z_IMAGE, "image": picture(), "mask_image": mask_picture()}),
    Case("SanaPipeline", sana, _SANA_CALL),
    Case("SanaPAGPipeline", sana, {**_SANA_CALL, "pag_scale": 2.0}, options={"pag_applied_layers": "blocks.0"}),
    Case("SanaControlNetPipeline", sana_controlnet, {**_SANA_CALL, "control_image": picture()}),
    Case("SanaSprintPipeline", sana_sprint, _SPRINT),
    Case("AuraFlowPipeline", aura_flow, guided(3.5, tokens=11, **masks(11), **IMAGE)),
    Case("LuminaPipeline", lumina_next, guided(4.0, **masks(), **IMAGE)),
    Case("Lumina2Pipeline", lumina_2, guided(4.0, **masks(), **IMAGE, cfg_trunc_ratio=0.7)),
    # it makes every image as large as this says
    Case("HiDreamImagePipeline", hidream, _HIDREAM, attributes={"default_sample_size": 16}),
    Case("CogView4Pipeline", cogview_4, guided(5.0, **IMAGE)),
    Case("PRXPipeline", prx, guided(4.0, **masks(), **IMAGE, use_resolution_binning=False)),
]
