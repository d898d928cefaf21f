"""Pipelines of newer diffusers classes whose loops nobody has read, by short names: cases of `bench.workloads.classes`.

`PIPELINES` maps a name to a function that makes a pipeline, and to the arguments of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import tiny

from bench.workloads.classes import CASES
from bench.workloads.classes.parts import flow


def _of(
    name: str, scheduler: Callable[[], Any] = lambda: None, **more: Any
) -> tuple[Callable[[], Any], dict[str, Any]]:
    case = CASES[name]
    return lambda: case.build(scheduler()), {**case.call, **more}


def _euler() -> Any:
    return flow(7.0)


def _ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(**{**tiny.SD_NOISE, **options})


_WINDOW = {"control_guidance_start": 0.2, "control_guidance_end": 0.7}
PIPELINES = {
    "wan": _of("WanPipeline", _euler),
    "wan, two videos": _of("WanPipeline", _euler, num_videos_per_prompt=2),
    "wan 2.2": _of("WanPipeline, 2.2", _euler),
    "qwen-image": _of("QwenImagePipeline"),
    "ltx": _of("LTXPipeline"),
    "cogvideox": _of("CogVideoXPipeline", lambda: _ddim(prediction_type="v_prediction")),
    "sana": _of("SanaPipeline", flow),
    "z-image": _of("ZImagePipeline"),
    "hunyuanvideo 1.5": _of("HunyuanVideo15Pipeline"),
    "kandinsky 5": _of("Kandinsky5T2VPipeline"),
    "sdxl controlnet": _of("StableDiffusionXLControlNetPipeline"),
    "sdxl controlnet, window": _of("StableDiffusionXLControlNetPipeline", **_WINDOW),
    "sd pag": _of("StableDiffusionPAGPipeline", _ddim),
    "flux inpaint": _of("FluxInpaintPipeline"),
}


def with_momentum() -> Any:
    return CASES["HunyuanVideo15Pipeline, guidance with momentum"].build()
