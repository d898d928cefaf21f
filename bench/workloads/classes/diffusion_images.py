"""Images by networks that predict noise or velocity: transformers, Kandinsky, cascades, pixels."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import CLIPTextModelWithProjection

from .case import Case
from .flow_images import transformer
from .parts import (
    IMAGE,
    SD_BETAS,
    SMALL,
    SMALL_UNET,
    TEXT,
    clip,
    clip_tokenizer,
    clip_vision,
    guided,
    heard,
    image,
    mask_picture,
    numbers,
    ones,
    picture,
    pixel_unet,
    t5,
    t5_tokenizer,
    vae,
)


def pixart() -> dict[str, Any]:
    return {
        "transformer": diffusers.PixArtTransformer2DModel(
            **transformer(num_attention_heads=3, sample_size=8),
            out_channels=8,
            caption_channels=32,
            cross_attention_dim=24,
            use_additional_conditions=False,
        ),
        "vae": vae(),
        "text_encoder": t5(),
        "tokenizer": t5_tokenizer(),
        # under its own betas the latents of a random network end in the hundreds
        "scheduler": diffusers.DPMSolverMultistepScheduler(**SD_BETAS),
    }


def dit() -> dict[str, Any]:
    return {
        "transformer": diffusers.DiTTransformer2DModel(
            **transformer(num_attention_heads=2, patch_size=4), out_channels=8
        ),
        "vae": vae(),
        "scheduler": diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False),  # as in PixArt
    }


def hunyuan_dit() -> dict[str, Any]:
    network = diffusers.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=32,
        activation_fn="gelu-approximate",
    )
    scheduler = diffusers.DDPMScheduler(**SD_BETAS, prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    parts = {"transformer": heard(network), "vae": vae(levels=4), "scheduler": scheduler}
    return {**parts, "requires_safety_checker": False}


COG_NOISE = {
    **SD_BETAS,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def cogview_3() -> dict[str, Any]:
    network = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=32,
        sample_size=32,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(**COG_NOISE, snr_shift_scale=4.0)
    return {"transformer": heard(network), "vae": vae(), "scheduler": scheduler}


# ---- Kandinsky

_KANDINSKY_UNET = {
    "in_channels": 4,
    "out_channels": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "encoder_hid_dim": 32,
    "encoder_hid_dim_type": "image_proj",
    "cross_attention_dim": 32,
    "resnet_time_scale_shift": "scale_shift",
    "class_embed_type": None,
    "norm_num_groups": 4,
}


def kandinsky(in_channels: int = 4, addition: str = "image") -> dict[str, Any]:
    sizes = {**SMALL_UNET, **_KANDINSKY_UNET, "in_channels": in_channels, "addition_embed_type": addition}
    autoencoder = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32),
        latent_channels=4,
        num_vq_embeddings=12,
        norm_type="spatial",
        vq_embed_dim=4,
    )
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)
    return {"unet": heard(diffusers.UNet2DConditionModel(**sizes)), "movq": autoencoder, "scheduler": scheduler}


def kandinsky_prior() -> dict[str, Any]:
    network = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1, additional_embeddings=4
    )
    network.clip_std.data.fill_(1.0)
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=10.0
    )
    vision = clip_vision()
    parts = {"text_encoder": clip(CLIPTextModelWithProjection), "tokenizer": clip_tokenizer()}
    parts |= {"image_encoder": vision["image_encoder"], "image_processor": vision["feature_extractor"]}
    return {"prior": heard(network), "scheduler": scheduler, **parts}


# ---- cascades and pixels

_CASCADE = {
    "block_out_channels": (16, 16),
    "num_attention_heads": (2, 2),
    "down_num_layers_per_block": (1, 1),
    "up_num_layers_per_block": (1, 1),
    "clip_text_pooled_in_channels": 32,
    "conditioning_dim": 16,
}


def cascade_prior() -> dict[str, Any]:
    network = diffusers.StableCascadeUNet(
        **_CASCADE, switch_level=(False,), clip_text_in_channels=32, clip_image_in_channels=32
    )
    return {"prior": heard(network), "scheduler": diffusers.DDPMWuerstchenScheduler(), **_cascade_text()}


def cascade_decoder() -> dict[str, Any]:
    from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel

    network = diffusers.StableCascadeUNet(
        **_CASCADE, in_channels=4, out_channels=4, patch_size=2, effnet_in_channels=16
    )
    autoencoder = PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=2)
    parts = {"scheduler": diffusers.DDPMWuerstchenScheduler(), "vqgan": autoencoder, **_cascade_text()}
    return {"decoder": heard(network), **parts}


def _cascade_text() -> dict[str, Any]:
    return {"text_encoder": clip(CLIPTextModelWithProjection), "tokenizer": clip_tokenizer()}


def deep_floyd() -> dict[str, Any]:
    network = diffusers.UNet2DConditionModel(
        **{**SMALL_UNET, **_KANDINSKY_UNET, "in_channels": 3, "out_channels": 6, "encoder_hid_dim_type": None},
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
    )
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, variance_type="learned_range", sample_max_value=1.5
    )
    return {"unet": heard(network), "scheduler": scheduler, "requires_safety_checker": False}


def amused() -> dict[str, Any]:
    network = diffusers.UVit2DModel(
        hidden_size=8,
        cond_embed_dim=32,
        micro_cond_embed_dim=10,
        micro_cond_encode_dim=2,
        encoder_hidden_size=32,
        vocab_size=32,
        codebook_size=8,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        sample_size=8,
    )
    autoencoder = diffusers.VQModel(
        block_out_channels=(8,), latent_channels=8, num_vq_embeddings=8, norm_num_groups=4, lookup_from_codebook=True
    )
    scheduler = diffusers.AmusedScheduler(mask_token_id=31)
    return {"transformer": network, "vqvae": autoencoder, "scheduler": scheduler, **_cascade_text()}


def ddim() -> dict[str, Any]:
    return {"unet": pixel_unet(), "scheduler": diffusers.DDIMScheduler()}


def ddpm() -> dict[str, Any]:
    return {"unet": pixel_unet(), "scheduler": diffusers.DDPMScheduler()}


def consistency() -> dict[str, Any]:
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=60, sigma_min=0.002, sigma_max=80.0)
    return {"unet": pixel_unet(num_class_embeds=10), "scheduler": scheduler}


_PIXART = {**TEXT, **SMALL, "max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False}
_EMBEDS = {
    "image_embeds": numbers(1, 32),
    "negative_image_embeds": numbers(1, 32, seed=2),
    "output_type": "pt",
    **IMAGE,
}
_HUNYUAN = {
    **guided(5.0, tokens=77),
    "prompt_embeds_2": numbers(1, 256, 32),
    "negative_prompt_embeds_2": numbers(1, 256, 32, seed=2),
    "prompt_attention_mask": ones(1, 77),
    "negative_prompt_attention_mask": ones(1, 77),
    "prompt_attention_mask_2": ones(1, 256),
    "negative_prompt_attention_mask_2": ones(1, 256),
    "use_resolution_binning": False,
    "height": 128,
    "width": 128,
}
_CASCADE_TEXT = {"prompt": "a fox", "guidance_scale": 4.0}

CASES = [
    Case("PixArtAlphaPipeline", pixart, _PIXART),
    Case("PixArtSigmaPipeline", pixart, _PIXART),
    Case("DiTPipeline", dit, {"class_labels": [1], "output_type": "pt"}),
    Case("HunyuanDiTPipeline", hunyuan_dit, _HUNYUAN),
    Case("CogView3PlusPipeline", cogview_3, guided(5.0, **IMAGE)),
    Case("KandinskyV22Pipeline", kandinsky, _EMBEDS),
    Case("KandinskyV22Img2ImgPipeline", kandinsky, {**_EMBEDS, "image": picture(), "strength": 0.8}),
    Case(
        "KandinskyV22InpaintPipeline",
        lambda: kandinsky(9),
        {**_EMBEDS, "image": picture(), "mask_image": mask_picture()},
    ),
    Case("KandinskyV22ControlnetPipeline", lambda: kandinsky(8, "image_hint"), {**_EMBEDS, "hint": image(128)}),
    Case("KandinskyV22PriorPipeline", kandinsky_prior, {"prompt": "a fox", "output_type": "pt"}),
    Case(
        "StableCascadePriorPipeline", cascade_prior, {**_CASCADE_TEXT, "height": 128, "width": 128, "output_type": "pt"}
    ),
    Case(
        "StableCascadeDecoderPipeline",
        cascade_decoder,
        {**_CASCADE_TEXT, "image_embeddings": numbers(1, 16, 4, 4), "output_type": "pt"},
    ),
    Case("IFPipeline", deep_floyd, {**guided(7.0), "output_type": "pt", **SMALL}),
    Case("AmusedPipeline", amused, {"prompt": "a fox", "output_type": "pt", **SMALL}),
    Case("DDIMPipeline", ddim, {"output_type": "pt"}),
    Case("DDPMPipeline", ddpm, {"output_type": "pt"}),
    Case("ConsistencyModelPipeline", consistency, {"class_labels": 1, "output_type": "pt"}),
]
