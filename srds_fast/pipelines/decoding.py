"""How pipelines decode their latents, for previews: a preview is decoded while the pipeline's own call still runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .known_classes import is_of_diffusers
from .state import Arguments

Decode = Callable[[Any, Tensor, Arguments], Any]
"""(pipe, the final latents of its loop, the arguments of the call) -> PIL images, as the pipe decodes them."""


def _decoded(pipe: Any, latents: Tensor, shift: float = 0.0) -> Any:
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor + shift, return_dict=False)[0]


def _decode_sd(pipe: Any, latents: Tensor, _arguments: Arguments) -> Any:
    images, flagged = pipe.run_safety_checker(_decoded(pipe, latents), latents.device, latents.dtype)
    denormalize = [True] * len(images) if flagged is None else [not each for each in flagged]
    return pipe.image_processor.postprocess(images, output_type="pil", do_denormalize=denormalize)


def _decode_sdxl(pipe: Any, latents: Tensor, _arguments: Arguments) -> Any:
    vae = pipe.vae
    if vae.dtype == torch.float16 and vae.config.force_upcast:
        # the stock call casts its VAE and casts it back; a preview must not, because the running call uses that VAE
        vae, latents = copy.deepcopy(vae).float(), latents.float()
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is not None and deviation is not None:
        shift, scale = (
            torch.tensor(each, dtype=torch.float32, device="cpu").view(1, -1, 1, 1).to(latents)
            for each in (mean, deviation)
        )
        latents = latents * scale / vae.config.scaling_factor + shift
    else:
        latents = latents / vae.config.scaling_factor
    images = vae.decode(latents, return_dict=False)[0]
    if getattr(pipe, "watermark", None) is not None:
        images = pipe.watermark.apply_watermark(images)
    return pipe.image_processor.postprocess(images, output_type="pil")


def _decode_shifted(pipe: Any, latents: Tensor, _arguments: Arguments) -> Any:
    images = _decoded(pipe, latents, pipe.vae.config.shift_factor)
    return pipe.image_processor.postprocess(images, output_type="pil")


def _decode_flux(pipe: Any, latents: Tensor, arguments: Arguments) -> Any:
    size = pipe.default_sample_size * pipe.vae_scale_factor
    height, width = arguments.get("height") or size, arguments.get("width") or size
    return _decode_shifted(pipe, pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor), arguments)


def _decode_pixart(pipe: Any, latents: Tensor, arguments: Arguments) -> Any:
    images = _decoded(pipe, latents)
    if arguments.get("use_resolution_binning"):
        size = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        width, height = arguments.get("width") or size, arguments.get("height") or size
        images = pipe.image_processor.resize_and_crop_tensor(images, width, height)
    return pipe.image_processor.postprocess(images, output_type="pil")


def _decode_dit(pipe: Any, latents: Tensor, arguments: Arguments) -> Any:
    return _decode_pixels(pipe, _decoded(pipe, latents), arguments)


def _decode_pixels(pipe: Any, pixels: Tensor, _arguments: Arguments) -> Any:
    images = (pixels / 2 + 0.5).clamp(0, 1)
    return pipe.numpy_to_pil(images.cpu().permute(0, 2, 3, 1).float().numpy())


DECODE: dict[str, Decode] = {
    "StableDiffusionPipeline": _decode_sd,
    "StableDiffusionImg2ImgPipeline": _decode_sd,
    "StableDiffusionInpaintPipeline": _decode_sd,
    "StableDiffusionControlNetPipeline": _decode_sd,
    "StableDiffusionXLPipeline": _decode_sdxl,
    "StableDiffusionXLImg2ImgPipeline": _decode_sdxl,
    "StableDiffusionXLInpaintPipeline": _decode_sdxl,
    "StableDiffusion3Pipeline": _decode_shifted,
    "FluxPipeline": _decode_flux,
    "PixArtAlphaPipeline": _decode_pixart,
    "DiTPipeline": _decode_dit,
    "DDIMPipeline": _decode_pixels,
    "DDPMPipeline": _decode_pixels,
}


def decoder_of(pipe: Any) -> Decode | None:
    """How a pipeline decodes, by the class that defines its `__call__`; None if that is not known."""
    owner = next(cls for cls in type(pipe).__mro__ if "__call__" in cls.__dict__)
    return DECODE.get(owner.__name__) if is_of_diffusers(owner.__call__) else None
