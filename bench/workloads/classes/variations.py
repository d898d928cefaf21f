"""Calls that ask for another grid of steps, or for another size, than the calls of the cases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# "Align Your Steps" for Stable Diffusion 1 and XL, as diffusers has them
AYS_SD = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
AYS_SDXL = [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]
FLOW_SIGMAS = [1.0, 0.95, 0.9, 0.8, 0.7, 0.55, 0.4, 0.25, 0.1]
KARRAS_SIGMAS = [14.6, 9.0, 5.5, 3.2, 1.9, 1.1, 0.6, 0.3, 0.03, 0.0]


@dataclass(frozen=True)
class Variation:
    """What a call of a case is changed to.

    Attributes:
        case: name of the case.
        note: what is changed, in words.
        call: other arguments; without `num_inference_steps` the grid has as many steps as is asked for.
        scheduler: a scheduler of diffusers to make from the case's own, where that does not take the arguments.
        options: what that scheduler is given beyond the config of the case's own.
    """

    case: str
    note: str
    call: dict[str, Any]
    scheduler: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


DPM = "DPMSolverMultistepScheduler"
EULER = "EulerDiscreteScheduler"
COGVIDEOX_DPM = "CogVideoXDPMScheduler"

VARIATIONS = [
    Variation("StableDiffusionPipeline", "timesteps (AYS)", {"timesteps": AYS_SD}, DPM),
    Variation("StableDiffusionPipeline", "sigmas", {"sigmas": KARRAS_SIGMAS}, EULER),
    Variation("StableDiffusionPipeline", "guidance_rescale", {"guidance_rescale": 0.7}),
    Variation("StableDiffusionPipeline", "no guidance", {"guidance_scale": 1.0}),
    Variation("StableDiffusionPipeline", "two images", {"num_images_per_prompt": 2}),
    Variation("StableDiffusionImg2ImgPipeline", "strength 0.5", {"strength": 0.5}),
    Variation("StableDiffusionImg2ImgPipeline", "strength 0.5", {"strength": 0.5}, EULER),
    Variation("StableDiffusionInpaintPipeline", "strength 0.5", {"strength": 0.5}),
    Variation("StableDiffusionControlNetPipeline", "control window", {"control_guidance_end": 0.6}),
    Variation("StableDiffusionXLPipeline", "timesteps (AYS)", {"timesteps": AYS_SDXL}, DPM),
    Variation("StableDiffusionXLPipeline", "timesteps (AYS)", {"timesteps": AYS_SDXL}),
    Variation("StableDiffusionXLPipeline", "denoising_end 0.8", {"denoising_end": 0.8}),
    Variation("StableDiffusionXLImg2ImgPipeline", "denoising_start 0.6", {"denoising_start": 0.6}),
    Variation(
        "StableDiffusionXLImg2ImgPipeline",
        "denoising_start 0.3, denoising_end 0.8",
        {"denoising_start": 0.3, "denoising_end": 0.8},
    ),
    Variation("StableDiffusionXLInpaintPipeline", "denoising_start 0.5", {"denoising_start": 0.5}),
    Variation("StableDiffusionXLControlNetPipeline", "control window", {"control_guidance_end": 0.6}),
    Variation("KolorsPipeline", "sigmas", {"sigmas": KARRAS_SIGMAS}),
    Variation("PixArtAlphaPipeline", "timesteps", {"timesteps": AYS_SD}),
    Variation("StableDiffusion3Pipeline", "sigmas", {"sigmas": FLOW_SIGMAS}),
    Variation("StableDiffusion3Pipeline", "skipped layers", {"skip_guidance_layers": [1]}),
    Variation("StableDiffusion3Img2ImgPipeline", "strength 0.5", {"strength": 0.5}),
    Variation("FluxPipeline", "sigmas", {"sigmas": FLOW_SIGMAS}),
    Variation("FluxPipeline", "true_cfg_scale", {"true_cfg_scale": 3.0, "negative_prompt": "a dog"}),
    Variation("FluxImg2ImgPipeline", "strength 0.5", {"strength": 0.5}),
    Variation("FluxInpaintPipeline", "strength 0.6", {"strength": 0.6}),
    Variation("QwenImagePipeline", "sigmas", {"sigmas": FLOW_SIGMAS}),
    Variation("QwenImageInpaintPipeline", "strength 0.6", {"strength": 0.6}),
    Variation("ZImagePipeline", "cfg_normalization", {"cfg_normalization": True}),
    Variation("CogView4Pipeline", "sigmas", {"sigmas": FLOW_SIGMAS, "num_inference_steps": len(FLOW_SIGMAS)}),
    Variation("WanPipeline", "one frame", {"num_frames": 1}),
    Variation("WanPipeline", "17 frames", {"num_frames": 17}),
    Variation("WanPipeline", "no guidance", {"guidance_scale": 1.0}),
    Variation("WanVideoToVideoPipeline", "strength 0.5", {"strength": 0.5}),
    Variation("HunyuanVideoPipeline", "sigmas", {"sigmas": FLOW_SIGMAS}),
    Variation("LTXPipeline", "17 frames, guidance_rescale", {"num_frames": 17, "guidance_rescale": 0.3}),
    Variation("CogVideoXPipeline", "use_dynamic_cfg", {"use_dynamic_cfg": True}),
    Variation("CogVideoXVideoToVideoPipeline", "strength 0.5", {"strength": 0.5}),
    Variation("CogVideoXPipeline", "two draws a step", {}, COGVIDEOX_DPM),
    Variation("CogVideoXVideoToVideoPipeline", "two draws a step, strength 0.5", {"strength": 0.5}, COGVIDEOX_DPM),
    Variation("CogView3PlusPipeline", "two draws a step", {}, COGVIDEOX_DPM),
    Variation("IFPipeline", "noise of fixed size", {}, "DDPMScheduler", {"variance_type": "fixed_small"}),
    Variation("IFPipeline", "noise of fixed size", {}, DPM, {"variance_type": None}),
    Variation("KandinskyV22Pipeline", "predicted noise", {}, "DDPMScheduler", {"variance_type": "learned_range"}),
    Variation("MochiPipeline", "13 frames", {"num_frames": 13}),
    Variation("AudioLDM2Pipeline", "two waveforms", {"num_waveforms_per_prompt": 2}),
]
