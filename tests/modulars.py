"""Modular pipelines of diffusers at a tiny size, with random weights, most of them with given prompt embeddings.

`PIPELINES` maps a name to a function that makes a pipeline, and to the arguments of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import modern
import pytest
import tiny
import torch
from torch import nn

from bench.workloads.classes.parts import flow, heard, mask_picture, numbers, ones, picture


def ready(blocks: Any, parts: dict[str, Any], without: tuple[str, ...] = ("text_encoder",)) -> Any:
    """A pipeline of these blocks but some, with those of the parts that it takes, for tests."""
    for name in without:
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    taken = {name: part for name, part in parts.items() if name in pipe.components and part is not None}
    pipe.update_components(**taken)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    _silence(pipe._blocks)
    return pipe


def _silence(block: Any) -> None:
    """The pipeline's own switch does not reach loops in blocks of blocks."""
    if hasattr(block, "progress_bar"):
        block.set_progress_bar_config(disable=True)
    for each in block.sub_blocks.values():
        _silence(each)


def _from(blocks: str, parts_of: Callable[[], Any], *without: str, **changes: Any) -> Callable[[], Any]:
    """Makes pipelines of a class of blocks from the parts of another tiny pipeline."""

    def build() -> Any:
        if not hasattr(diffusers, blocks):
            pytest.skip(f"diffusers {diffusers.__version__} has no {blocks}")
        torch.manual_seed(0)
        parts = parts_of()
        given = parts if isinstance(parts, dict) else dict(parts.components)
        more = {name: make() for name, make in changes.items()}
        return ready(getattr(diffusers, blocks)(), {**given, **more}, without)

    return build


def _flux_2_parts() -> dict[str, Any]:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=[4, 4, 4, 4],
    )
    return {"transformer": heard(transformer), "vae": _vae_2(), "scheduler": _shifted()}


def _vae_2() -> Any:
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _shifted() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def _flux_3_parts() -> dict[str, Any]:
    transformer = diffusers.Flux3Transformer2DModel(
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_channels=16,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return {"transformer": heard(transformer), "vae": _vae_2(), "scheduler": flow(1.0)}


def _krea_2_parts() -> dict[str, Any]:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=1,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    return {"transformer": heard(transformer), "vae": modern.PIPELINES["qwen-image"][0]().vae, "scheduler": _shifted()}


def _ernie_parts() -> dict[str, Any]:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    return {"transformer": heard(transformer), "vae": _vae_2(), "scheduler": flow()}


def _ideogram_parts() -> dict[str, Any]:
    def network(seed: int) -> Any:
        sizes = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "intermediate_size": 32}
        inputs = {"in_channels": 4, "adaln_dim": 16, "llm_features_dim": 16, "mrope_section": (4, 2, 2)}
        return heard(diffusers.Ideogram4Transformer2DModel(**sizes, **inputs), seed)

    both = {"transformer": network(5), "unconditional_transformer": network(6)}
    return {**both, "vae": _vae_2(), "scheduler": flow(1.0)}


def _qwen_2_1_parts() -> dict[str, Any]:
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        mlp_ratio=2,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return {"transformer": heard(transformer), "vae": vae, "scheduler": _shifted()}


def _helios_parts() -> dict[str, Any]:
    transformer = diffusers.HeliosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_dim=(4, 4, 4),
    )
    parts = {"transformer": heard(transformer), "vae": modern.PIPELINES["wan"][0]().vae}
    return {**parts, "scheduler": diffusers.HeliosScheduler(stages=1)}


def _wan_unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


sdxl = _from("StableDiffusionXLAutoBlocks", tiny._sdxl)
flux = _from("FluxAutoBlocks", lambda: tiny._flux(guidance_embeds=True))
sd3 = _from("StableDiffusion3AutoBlocks", tiny._sd3)
wan = _from("WanBlocks", modern.PIPELINES["wan"][0], "text_encoder", scheduler=_wan_unipc)
qwen_image = _from("QwenImageAutoBlocks", modern.PIPELINES["qwen-image"][0], "text_encoder")
z_image = _from("ZImageAutoBlocks", modern.PIPELINES["z-image"][0], "text_encoder")
flux_2 = _from("Flux2AutoBlocks", _flux_2_parts, "text_encoder")

_IMAGE = {"height": 32, "width": 32}
_TEXT = {"prompt": "a fox", **_IMAGE}
_FROM_IMAGE = {"image": picture(), "strength": 0.8}
_MASKED = {**_FROM_IMAGE, "mask_image": mask_picture()}
_CONTROL = {**_TEXT, "control_image": picture()}
_T5 = {"max_sequence_length": 16}
_FLUX = {"prompt": "a fox", "height": 16, "width": 16, **_T5}
_EMBEDS = {"prompt_embeds": numbers(1, 16, 32), "negative_prompt_embeds": numbers(1, 16, 32, seed=2)}
_MASKS = {"prompt_attention_mask": ones(1, 16), "negative_prompt_attention_mask": ones(1, 16)}
_VIDEO = {**_EMBEDS, "height": 16, "width": 16, "num_frames": 9}
_QWEN = {
    name: value
    for name, value in modern.PIPELINES["qwen-image"][1].items()
    if name not in ("true_cfg_scale", "output_type")
}
_FLUX_2 = {"prompt_embeds": numbers(1, 7, 16), "height": 16, "width": 16}
_FLUX_2_GUIDED = {**_FLUX_2, "negative_prompt_embeds": numbers(1, 7, 16, seed=2)}
_Z_IMAGE = {"prompt_embeds": [numbers(9, 16)], "negative_prompt_embeds": [numbers(6, 16)], **_IMAGE}
_ERNIE = {"prompt_embeds": [numbers(7, 16)], "negative_prompt_embeds": [numbers(5, 16, seed=2)], **_IMAGE}
_KREA = {
    "prompt_embeds": numbers(1, 7, 2, 16),
    "prompt_embeds_mask": ones(1, 7).bool(),
    "negative_prompt_embeds": numbers(1, 7, 2, 16, seed=2),
    "negative_prompt_embeds_mask": ones(1, 7).bool(),
    **_IMAGE,
}
QWEN_2_1 = {
    **_QWEN,
    "image_pad_mask": torch.zeros(1, 7, dtype=torch.bool),
    "negative_image_pad_mask": torch.zeros(1, 5, dtype=torch.bool),
    "use_kv_cache": False,
}
_IDEOGRAM = {"text_features": numbers(1, 7, 16), "text_lengths": [7], "height": 32, "width": 32}

PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sdxl": (sdxl, _TEXT),
    "sdxl, from an image": (sdxl, {**_TEXT, **_FROM_IMAGE}),
    "sdxl, masked": (sdxl, {**_TEXT, **_MASKED}),
    "sdxl controlnet": (_from("StableDiffusionXLAutoBlocks", modern.PIPELINES["sdxl controlnet"][0]), _CONTROL),
    "sd3": (sd3, {**_TEXT, **_T5}),
    "sd3, from an image": (sd3, {**_TEXT, **_T5, **_FROM_IMAGE}),
    "flux": (flux, _FLUX),
    "flux, from an image": (flux, {**_FLUX, **_FROM_IMAGE}),
    "flux kontext": (
        _from("FluxKontextAutoBlocks", lambda: tiny._flux(guidance_embeds=True)),
        {**_FLUX, "image": picture(), "max_area": 256, "_auto_resize": False},
    ),
    "flux 2": (flux_2, _FLUX_2),
    "flux 2 klein": (_from("Flux2KleinAutoBlocks", _flux_2_parts, "text_encoder"), _FLUX_2),
    "flux 2 klein base": (_from("Flux2KleinBaseAutoBlocks", _flux_2_parts, "text_encoder"), _FLUX_2_GUIDED),
    "flux 3": (_from("Flux3AutoBlocks", _flux_3_parts, "text_encoder", "prompt_upsampler"), _FLUX_2_GUIDED),
    "wan": (wan, _VIDEO),
    "wan 2.2": (_from("Wan22Blocks", modern.PIPELINES["wan 2.2"][0], "text_encoder"), _VIDEO),
    "qwen-image": (qwen_image, _QWEN),
    "qwen-image, from an image": (qwen_image, {**_QWEN, **_FROM_IMAGE}),
    "qwen-image, masked": (qwen_image, {**_QWEN, **_MASKED}),
    "qwen-image 2.1": (_from("QwenImage21AutoBlocks", _qwen_2_1_parts, "text_encoder"), QWEN_2_1),
    "z-image": (z_image, _Z_IMAGE),
    "z-image, from an image": (z_image, {**_Z_IMAGE, **_FROM_IMAGE}),
    "ltx": (
        _from("LTXAutoBlocks", modern.PIPELINES["ltx"][0], "text_encoder"),
        {
            **_EMBEDS,
            "prompt_attention_mask": ones(1, 16),
            "negative_prompt_attention_mask": ones(1, 16),
            **_IMAGE,
            "num_frames": 9,
        },
    ),
    "hunyuanvideo 1.5": (
        _from("HunyuanVideo15AutoBlocks", modern.PIPELINES["hunyuanvideo 1.5"][0], "text_encoder"),
        {name: value for name, value in modern.PIPELINES["hunyuanvideo 1.5"][1].items() if name != "output_type"},
    ),
    "krea 2": (_from("Krea2AutoBlocks", _krea_2_parts, "text_encoder"), _KREA),
    "ernie-image": (_from("ErnieImageAutoBlocks", _ernie_parts, "text_encoder", "prompt_enhancer"), _ERNIE),
    "ideogram 4": (_from("Ideogram4AutoBlocks", _ideogram_parts, "text_encoder", "prompt_upsample"), _IDEOGRAM),
    "helios": (_from("HeliosAutoBlocks", _helios_parts, "text_encoder"), _VIDEO),
}
