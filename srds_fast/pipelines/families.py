"""The diffusers pipelines whose loops are known, for takeover, and how they decode, for previews.

Any other loop is rehearsed, see `lockstep`. To list a pipeline, read its loop by hand, add a
`Family`, and add it to the test matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedPipeline
from .networks import Arguments, Loop, network_family, unwrapped


@dataclass(frozen=True)
class Family:
    """A pipeline class whose loop is known. Its functions take the pipe and the arguments of a call."""

    loop: Callable[[Any, Arguments], Loop]
    # the final latents of the loop -> PIL images, as the pipe decodes them; None if not known
    decode: Callable[[Any, Tensor, Arguments], Any] | None


def _loop(
    *networks: str, why_turns: Callable[[Arguments], str | None] = lambda arguments: None
) -> Callable[[Any, Arguments], Loop]:
    return lambda _pipe, arguments: Loop(networks, why_turns=why_turns(arguments))


def _inpainting(pipe: Any, _arguments: Arguments) -> Loop:
    """A 9-channel network gets mask and image as channels; a 4-channel one gets neither."""
    if pipe.unet.config.in_channels == 4:
        return Loop(("unet",), why_turns="its loop puts the known part of the image back after every step")
    return Loop(("unet",), why_turns="its loop joins conditioning to the states")


def _dit(_pipe: Any, arguments: Arguments) -> Loop:
    return Loop(("transformer",), copies=2 if arguments["guidance_scale"] > 1 else 1, overwrites=True)


def _skipped_layers(arguments: Arguments) -> str | None:
    given = arguments.get("skip_guidance_layers") is not None
    return "skip_guidance_layers was given: it switches guidance on and off by step number" if given else None


def _control_window(arguments: Arguments) -> str | None:
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
    "StableDiffusionControlNetPipeline": Family(_loop("unet", "controlnet", why_turns=_control_window), _decode_sd),
    "StableDiffusionXLPipeline": Family(_loop("unet"), _decode_sdxl),
    "StableDiffusionXLImg2ImgPipeline": Family(_loop("unet"), _decode_sdxl),
    "StableDiffusionXLInpaintPipeline": Family(_inpainting, _decode_sdxl),
    "StableDiffusion3Pipeline": Family(_loop("transformer", why_turns=_skipped_layers), _decode_shifted),
    "FluxPipeline": Family(_loop("transformer"), _decode_flux),
    "PixArtAlphaPipeline": Family(_loop("transformer"), _decode_pixart),
    "DiTPipeline": Family(_dit, _decode_dit),
    "DDIMPipeline": Family(_loop("unet"), _decode_pixels),
    "DDPMPipeline": Family(_loop("unet"), _decode_pixels),
}


def family_of(pipe: Any) -> Family:
    """The family of a pipeline, by the class that defines its `__call__`.

    Raises:
        UnsupportedPipeline: it is no pipeline with a scheduler.
    """
    owner = next((cls for cls in type(pipe).__mro__ if "__call__" in cls.__dict__), None)
    name = type(pipe).__name__
    if isinstance(pipe, type):
        raise UnsupportedPipeline(
            f"{pipe.__name__} is a class. compile() takes an instance. Pass {pipe.__name__}.from_pretrained(...)."
        )
    if owner is None or getattr(pipe, "scheduler", None) is None or not hasattr(pipe, "components"):
        raise UnsupportedPipeline(
            f"{name} is no diffusers pipeline with a scheduler. compile() drives a pipeline's own loop. "
            "Pass a DiffusionPipeline, or call srds_fast.sample with a denoiser."
        )
    listed = FAMILIES.get(owner.__name__)
    if listed is None or not is_diffusers(owner.__call__):
        return Family(_unlisted_loop, None)
    networks = listed.loop(pipe, {"guidance_scale": 0.0}).networks
    if not all(network_family(getattr(pipe, network, None)) for network in networks):
        return Family(_unlisted_loop, listed.decode)
    return listed


def is_diffusers(call: Any) -> bool:
    """Whether a pipeline's `__call__`, with its decorators, is all from diffusers or torch."""
    function: Any = call
    while function is not None:
        # functools.wraps copies __module__, so only the globals show where the code comes from
        module = str(getattr(function, "__globals__", {}).get("__name__", type(function).__module__))
        if module.partition(".")[0] not in ("diffusers", "torch"):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _unlisted_loop(pipe: Any, _arguments: Arguments) -> Loop:
    """A loop that may call any network but the autoencoders."""
    from diffusers import ModelMixin

    parts = {name: part for name, part in vars(pipe).items() if isinstance(part, nn.Module)}
    models = [name for name, part in parts.items() if isinstance(unwrapped(part), ModelMixin)]
    networks = [name for name in models if not hasattr(parts[name], "decode")]
    return Loop(tuple(networks or models or parts), why_turns="its loop was not read by hand: its steps may differ")
