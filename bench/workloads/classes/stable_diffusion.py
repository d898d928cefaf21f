"""Stable Diffusion 1 and XL and what is built around their UNets."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from transformers import CLIPTextModelWithProjection

from .case import Case
from .parts import (
    BLOCKS,
    IMAGE,
    SD_BETAS,
    SD_NOISE,
    SMALL,
    TEXT,
    clip,
    clip_tokenizer,
    clip_vision,
    frames_of,
    guided,
    heard,
    image,
    mask,
    numbers,
    picture,
    unet,
    vae,
)

# The order in which parts are made decides which random numbers a part gets.


def sd(unet_channels: int = 4, **changes: Any) -> dict[str, Any]:
    return {
        "unet": unet(unet_channels, **changes),
        "vae": vae(),
        "text_encoder": clip(),
        "tokenizer": clip_tokenizer(),
        "scheduler": diffusers.PNDMScheduler(**SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


SDXL_UNET = {
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    # six sizes and the pooled text
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}


def sdxl(unet_channels: int = 4) -> dict[str, Any]:
    return {
        "unet": unet(unet_channels, **SDXL_UNET),
        # the default logs a warning at each encoding of an image
        "vae": vae(force_upcast=False),
        "text_encoder": clip(),
        "text_encoder_2": clip(CLIPTextModelWithProjection),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": diffusers.EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
        "add_watermarker": False,
    }


def sd_controlnet(num_controlnets: int = 1) -> dict[str, Any]:
    parts = sd()
    controlnets = []
    for _ in range(num_controlnets):
        net = diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16))
        controlnets.append(net)
        for conv in (net.controlnet_cond_embedding.conv_out, *net.controlnet_down_blocks, net.controlnet_mid_block):
            # zero at the start of training: as built, a ControlNet changes nothing
            torch.nn.init.normal_(conv.weight, std=0.2)
    return {**parts, "controlnet": controlnets if num_controlnets > 1 else controlnets[0]}


_CONTROL = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": BLOCKS["down_block_types"],
    "conditioning_embedding_out_channels": (8, 16),
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    **SDXL_UNET,
}


def sdxl_controlnet() -> dict[str, Any]:
    return {**sdxl(), "controlnet": heard(diffusers.ControlNetModel(**_CONTROL))}


def sdxl_controlnet_union() -> dict[str, Any]:
    sizes = {"num_control_type": 2, "num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8}
    return {**sdxl(), "controlnet": heard(diffusers.ControlNetUnionModel(**_CONTROL, **sizes))}


# features of an adapter go into the first block before it halves them
_ATTENTION_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def _adapter(kind: str) -> Any:
    return diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type=kind)


def sd_adapter() -> dict[str, Any]:
    return {**sd(**_ATTENTION_FIRST), "adapter": _adapter("full_adapter")}


def sdxl_adapter() -> dict[str, Any]:
    parts = {**sdxl(), "adapter": _adapter("full_adapter")}
    return {**parts, "unet": unet(**SDXL_UNET, **_ATTENTION_FIRST)}


def upscale() -> dict[str, Any]:
    """The image to enlarge is joined to the latents, and the noise level on it is a class label."""
    noise = diffusers.DDIMScheduler(**SD_NOISE, prediction_type="v_prediction")
    return {**sd(7, num_class_embeds=400), "scheduler": noise, "low_res_scheduler": diffusers.DDPMScheduler()}


def image_variation() -> dict[str, Any]:
    return {**sd(), **clip_vision()}


def instruct() -> dict[str, Any]:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**SD_BETAS, steps_offset=1)
    return {**sd(8), "scheduler": scheduler, "image_encoder": None}


def latent_consistency() -> dict[str, Any]:
    return {**sd(time_cond_proj_dim=16), "scheduler": diffusers.LCMScheduler(**SD_BETAS)}


def kolors() -> dict[str, Any]:
    """SDXL's UNet under one text encoder, whose embeddings are given."""
    wide = {**SDXL_UNET, "encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj"}
    scheduler = diffusers.EulerDiscreteScheduler(**{**SD_BETAS, "beta_end": 0.014}, steps_offset=1)
    return {"unet": unet(**wide), "vae": vae(force_upcast=False), "scheduler": scheduler}


def marigold() -> dict[str, Any]:
    scheduler = diffusers.DDIMScheduler(**SD_NOISE, prediction_type="v_prediction")
    return {**sd(8), "scheduler": scheduler, "scale_invariant": True, "shift_invariant": True}


def _motion() -> Any:
    sizes = {"motion_layers_per_block": 1, "motion_norm_num_groups": 4, "motion_num_attention_heads": 4}
    return heard(diffusers.MotionAdapter(block_out_channels=(8, 16), motion_mid_block_layers_per_block=1, **sizes))


def animatediff() -> dict[str, Any]:
    scheduler = diffusers.DDIMScheduler(**{**SD_BETAS, "beta_schedule": "linear"}, clip_sample=False, steps_offset=1)
    return {**sd(), "motion_adapter": _motion(), "scheduler": scheduler}


def animatediff_sdxl() -> dict[str, Any]:
    return {**sdxl(), "motion_adapter": _motion()}


_UNET_3D = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "attention_head_dim": 4,
}


def text_to_video() -> dict[str, Any]:
    return {**sd(), "unet": heard(diffusers.UNet3DConditionModel(**_UNET_3D)), "scheduler": _ddim()}


def i2vgen_xl() -> dict[str, Any]:
    return {**sd(), **clip_vision(), "unet": heard(diffusers.I2VGenXLUNet(**_UNET_3D)), "scheduler": _ddim()}


def _ddim() -> Any:
    return diffusers.DDIMScheduler(**SD_NOISE)


def stable_video() -> dict[str, Any]:
    network = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        in_channels=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=8,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        **SD_BETAS,
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    decoder = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4
    )
    return {"unet": heard(network), "scheduler": scheduler, "vae": decoder, **clip_vision()}


_GUIDED = {**TEXT, "guidance_scale": 5.0}
_SIZED = {**_GUIDED, **IMAGE}
_FROM_IMAGE = {**_GUIDED, "image": image(), "strength": 0.8}
_INPAINT = {**_SIZED, "image": image(), "mask_image": mask()}
_VIDEO = {**_GUIDED, **SMALL, "num_frames": 4}
_KOLORS = {
    "prompt_embeds": numbers(1, 16, 32),
    "negative_prompt_embeds": numbers(1, 16, 32, seed=2),
    "pooled_prompt_embeds": numbers(1, 32),
    "negative_pooled_prompt_embeds": numbers(1, 32, seed=2),
    "output_type": "latent",
}
_PAG = {"pag_scale": 0.9, "pag_adaptive_scale": 0.5}
_MID = {"pag_applied_layers": "mid"}

CASES = [
    Case("StableDiffusionPipeline", sd, _SIZED),
    Case("StableDiffusionImg2ImgPipeline", sd, _FROM_IMAGE),
    Case("StableDiffusionInpaintPipeline", lambda: sd(9), _INPAINT),
    Case("StableDiffusionInpaintPipeline", sd, _INPAINT, "4 channels"),
    Case("StableDiffusionDepth2ImgPipeline", lambda: sd(5), {**_FROM_IMAGE, "depth_map": numbers(1, 16, 16)}),
    Case("StableDiffusionUpscalePipeline", upscale, {**_GUIDED, "image": image(16)}),
    Case(
        "StableDiffusionImageVariationPipeline", image_variation, {"image": image(), "output_type": "latent", **IMAGE}
    ),
    Case("StableDiffusionInstructPix2PixPipeline", instruct, {**_GUIDED, "image": image()}),
    Case("StableDiffusionControlNetPipeline", sd_controlnet, {**_SIZED, "image": image()}),
    Case("StableDiffusionControlNetImg2ImgPipeline", sd_controlnet, {**_FROM_IMAGE, "control_image": image()}),
    Case("StableDiffusionControlNetInpaintPipeline", sd_controlnet, {**_INPAINT, "control_image": image()}),
    Case("StableDiffusionAdapterPipeline", sd_adapter, {**_SIZED, "image": image()}),
    Case("StableDiffusionPAGPipeline", sd, {**_SIZED, **_PAG}, options=_MID),
    Case("StableDiffusionSAGPipeline", sd, {**_SIZED, "sag_scale": 0.75}),
    Case("StableDiffusionPanoramaPipeline", sd, {**_GUIDED, "height": 32, "width": 64}),
    Case("LatentConsistencyModelPipeline", latent_consistency, _SIZED),
    Case("StableDiffusionXLPipeline", sdxl, _SIZED),
    Case("StableDiffusionXLImg2ImgPipeline", sdxl, _FROM_IMAGE),
    Case("StableDiffusionXLInpaintPipeline", lambda: sdxl(9), _INPAINT),
    Case("StableDiffusionXLInpaintPipeline", sdxl, _INPAINT, "4 channels"),
    Case("StableDiffusionXLInstructPix2PixPipeline", lambda: sdxl(8), {**_SIZED, "image": image()}),
    Case("StableDiffusionXLControlNetPipeline", sdxl_controlnet, {**_SIZED, "image": image()}),
    Case("StableDiffusionXLControlNetImg2ImgPipeline", sdxl_controlnet, {**_FROM_IMAGE, "control_image": image()}),
    Case("StableDiffusionXLControlNetInpaintPipeline", sdxl_controlnet, {**_INPAINT, "control_image": image()}),
    Case(
        "StableDiffusionXLControlNetUnionPipeline",
        sdxl_controlnet_union,
        {**_SIZED, "control_image": [image()], "control_mode": [1]},
    ),
    Case("StableDiffusionXLAdapterPipeline", sdxl_adapter, {**_SIZED, "image": image()}),
    Case("StableDiffusionXLPAGPipeline", sdxl, {**_SIZED, "pag_scale": 3.0}, options=_MID),
    Case("KolorsPipeline", kolors, {**_KOLORS, **IMAGE}),
    Case("MarigoldDepthPipeline", marigold, {"image": image(), "processing_resolution": 0, "output_type": "pt"}),
    Case("AnimateDiffPipeline", animatediff, _VIDEO),
    Case("AnimateDiffVideoToVideoPipeline", animatediff, {**_GUIDED, **SMALL, "video": frames_of(4)}),
    Case("AnimateDiffSDXLPipeline", animatediff_sdxl, _VIDEO),
    Case("TextToVideoSDPipeline", text_to_video, _VIDEO),
    Case("VideoToVideoSDPipeline", text_to_video, {**_GUIDED, "video": frames_of(4), "strength": 0.8}),
    Case("I2VGenXLPipeline", i2vgen_xl, guided(**IMAGE, num_frames=4, image=picture())),
    Case(
        "StableVideoDiffusionPipeline",
        stable_video,
        {"image": image(), "min_guidance_scale": 1.0, "max_guidance_scale": 2.5, "num_frames": 2, **IMAGE}
        | {"output_type": "latent"},
    ),
]
