"""How the known pipelines turn final latents into images."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor

from .loop import Arguments


def decode_sd(pipe: Any, latents: Tensor, _arguments: Arguments) -> Any:
    images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    images, flagged = pipe.run_safety_checker(images, latents.device, latents.dtype)
    denormalize = [True] * len(images) if flagged is None else [not each for each in flagged]
    return pipe.image_processor.postprocess(images, output_type="pil", do_denormalize=denormalize)


_float32_vaes: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def decode_sdxl(pipe: Any, latents: Tensor, _arguments: Arguments) -> Any:
    vae = pipe.vae
    if vae.dtype == torch.float16 and vae.config.force_upcast:
        # the stock call casts its VAE and casts it back; a preview must not, because the running call uses that VAE
        vae = _float32_vaes.get(pipe.vae) or _float32_vaes.setdefault(pipe.vae, copy.deepcopy(pipe.vae).float())
        latents = latents.float()
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is not None and deviation is not None:
        shift, scale = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (mean, deviation))
        latents = latents * scale / vae.config.scaling_factor + shift
    else:
        latents = latents / vae.config.scaling_factor
    images = vae.decode(latents, return_dict=False)[0]
    if getattr(pipe, "watermark", None) is not None:
        images = pipe.watermark.apply_watermark(images)
    return pipe.image_processor.postprocess(images, output_type="pil")


def decode_shifted(pipe: Any, latents: Tensor, _arguments: Arguments) -> Any:
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0], output_type="pil")


def decode_flux(pipe: Any, latents: Tensor, arguments: Arguments) -> Any:
    size = pipe.default_sample_size * pipe.vae_scale_factor
    height, width = arguments.get("height") or size, arguments.get("width") or size
    return decode_shifted(pipe, pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor), arguments)


def decode_pixart(pipe: Any, latents: Tensor, arguments: Arguments) -> Any:
    images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    if arguments.get("use_resolution_binning"):
        size = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        width, height = arguments.get("width") or size, arguments.get("height") or size
        images = pipe.image_processor.resize_and_crop_tensor(images, width, height)
    return pipe.image_processor.postprocess(images, output_type="pil")


def decode_dit(pipe: Any, latents: Tensor, arguments: Arguments) -> Any:
    return decode_pixels(pipe, pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample, arguments)


def decode_pixels(pipe: Any, pixels: Tensor, _arguments: Arguments) -> Any:
    images = (pixels / 2 + 0.5).clamp(0, 1)
    return pipe.numpy_to_pil(images.cpu().permute(0, 2, 3, 1).float().numpy())
