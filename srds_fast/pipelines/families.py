"""The known diffusers pipelines: their loops, how they decode, and which calls need the stock loop.

For a pipeline class that is not listed, `lockstep.source_check` reads the source. A plain loop is driven; any other
loop is refused, with the reason. To list a pipeline, read its loop by hand, add a `Family`, and add it to the test
matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedPipeline
from .lockstep.source_check import replaced, unknown_in_loop
from .networks import NETWORKS, Arguments, Loop, network_family, unwrapped


@dataclass(frozen=True)
class Family:
    """A pipeline class whose loop is known. Its functions take the pipe and the arguments of a call."""

    loop: Callable[[Any, Arguments], Loop]
    # the final latents of the loop -> PIL images, as the pipe decodes them; None if not known
    decode: Callable[[Any, Tensor, Arguments], Any] | None
    # why this call must run on the stock loop, or None
    stock_if: Callable[[Any, Arguments], str | None] = lambda pipe, arguments: None


def _loop(*networks: str, **known: Any) -> Callable[[Any, Arguments], Loop]:
    return lambda _pipe, _arguments: Loop(networks, **known)


def _inpainting(pipe: Any, _arguments: Arguments) -> Loop:
    """A 9-channel network gets mask and image as channels; a 4-channel one gets neither."""
    blends = pipe.unet.config.in_channels == 4
    return Loop(("unet",), blends=blends, joins=not blends)


def _dit(_pipe: Any, arguments: Arguments) -> Loop:
    return Loop(("transformer",), copies=2 if arguments["guidance_scale"] > 1 else 1)


def _skipped_layers(_pipe: Any, arguments: Arguments) -> str | None:
    given = arguments.get("skip_guidance_layers") is not None
    return "skip_guidance_layers was given: it switches guidance on and off by step number" if given else None


def _control_window(_pipe: Any, arguments: Arguments) -> str | None:
    start, end = arguments.get("control_guidance_start", 0.0), arguments.get("control_guidance_end", 1.0)
    starts, ends = (each if isinstance(each, list) else [each] for each in (start, end))
    if all(each == 0.0 for each in starts) and all(each == 1.0 for each in ends):
        return None
    return "control_guidance_start or _end was given: it switches the ControlNet by step number"


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
        shift, scale = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (mean, deviation))
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


FAMILIES = {
    "StableDiffusionPipeline": Family(_loop("unet"), _decode_sd),
    "StableDiffusionImg2ImgPipeline": Family(_loop("unet"), _decode_sd),
    "StableDiffusionInpaintPipeline": Family(_inpainting, _decode_sd),
    "StableDiffusionControlNetPipeline": Family(_loop("unet", "controlnet", counts=True), _decode_sd, _control_window),
    "StableDiffusionXLPipeline": Family(_loop("unet"), _decode_sdxl),
    "StableDiffusionXLImg2ImgPipeline": Family(_loop("unet"), _decode_sdxl),
    "StableDiffusionXLInpaintPipeline": Family(_inpainting, _decode_sdxl),
    "StableDiffusion3Pipeline": Family(_loop("transformer"), _decode_shifted, _skipped_layers),
    "FluxPipeline": Family(_loop("transformer"), _decode_flux),
    "PixArtAlphaPipeline": Family(_loop("transformer"), _decode_pixart),
    "DiTPipeline": Family(_dit, _decode_dit),
    "DDIMPipeline": Family(_loop("unet"), _decode_pixels),
    "DDPMPipeline": Family(_loop("unet"), _decode_pixels),
}


def family_of(pipe: Any) -> Family:
    """The family of a pipeline, by the class that defines its `__call__`.

    Raises:
        UnsupportedPipeline: it is no pipeline, its loop is not understood, or a network's family is unknown.
    """
    owner = next((cls for cls in type(pipe).__mro__ if "__call__" in cls.__dict__), None)
    name = type(pipe).__name__
    if isinstance(pipe, type):
        raise UnsupportedPipeline(
            f"{pipe.__name__} is a class. compile() takes an instance. Pass {pipe.__name__}.from_pretrained(...)."
        )
    if owner is None or not hasattr(pipe, "scheduler"):
        raise UnsupportedPipeline(
            f"{name} is no diffusers pipeline with a scheduler. compile() drives a pipeline's own loop. "
            "Pass a DiffusionPipeline, or call srds_fast.sample with a denoiser."
        )
    listed = FAMILIES.get(owner.__name__) if owner.__module__.startswith("diffusers.") else None
    reason = replaced(owner.__call__) if listed else unknown_in_loop(owner.__call__)
    if reason is not None:
        raise UnsupportedPipeline(
            f"{name} cannot be driven: {reason}. Run once per wave, this loop could give another image. "
            "Call the pipeline as it is, or srds_fast.sample with its denoiser."
        )
    family = listed or Family(_unlisted_loop, None)
    for component in family.loop(pipe, {"guidance_scale": 0.0}).networks:
        network = getattr(pipe, component, None)
        if network_family(network) is None:
            raise UnsupportedPipeline(
                f"The {component} of this {name} is a {type(unwrapped(network)).__name__}. Supported networks are "
                f"{', '.join(NETWORKS)}. Call srds_fast.sample with it instead."
            )
    return family


def _unlisted_loop(pipe: Any, _arguments: Arguments) -> Loop:
    """The loop of an unlisted pipeline whose source passed the check: it calls the pipe's denoiser."""
    networks = tuple(name for name in ("unet", "transformer") if getattr(pipe, name, None) is not None)
    return Loop(networks, joins=True, checked=False)
