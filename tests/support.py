"""What is supported, as data: the test matrix runs every cell of it, and the guide's tables are written from it.

python tests/support.py          # writes the tables into srds_fast/pipelines/README.md
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import tiny
import torch
from calls import denoiser, look
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PixArtSigmaPipeline,
    PNDMScheduler,
    StableDiffusion3Img2ImgPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from packaging.version import Version

GUIDE = Path(__file__).parent.parent / "srds_fast" / "pipelines" / "README.md"
STEPS = 9

VP = {**tiny.SD_BETAS, "steps_offset": 1}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DDIM": lambda: DDIMScheduler(**tiny.SD_NOISE),
    "Euler": lambda: EulerDiscreteScheduler(**VP),
    "DPM-Solver++ (1, 2)": lambda: DPMSolverMultistepScheduler(**VP),
    "DDPM": lambda: DDPMScheduler(**VP, clip_sample=False),
    "Euler ancestral": lambda: EulerAncestralDiscreteScheduler(**VP),
    "PNDM": lambda: PNDMScheduler(**VP, skip_prk_steps=True),
    "UniPC": lambda: UniPCMultistepScheduler(**VP),
    "flow-matching Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}
NOISE = tuple(SCHEDULERS)[:7]
FLOW = ("flow-matching Euler", "DPM-Solver++ (1, 2)", "UniPC")
FLOW_DPM = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


class Verdict(NamedTuple):
    """What becomes of a call: it is accelerated, or runs on the stock loop with a reason."""

    kind: str
    why: str = ""

    def __str__(self) -> str:
        return self.kind + (f": {self.why}" if self.why else "")


DRIVEN = Verdict("accelerated")


def stock(why: str) -> Verdict:
    return Verdict("stock loop", why)


@dataclass(frozen=True)
class Pipeline:
    """A row of the first table.

    tiny: its entry in tiny.PIPELINES. schedulers: columns it is accelerated with. others: verdicts on other columns.
    flow: its network predicts a velocity.
    """

    name: str
    tiny: str
    schedulers: tuple[str, ...]
    others: dict[str, Verdict] = field(default_factory=dict)
    flow: bool = False

    def build(self, scheduler: str) -> Any:
        pipe = tiny.PIPELINES[self.tiny][0]()
        pipe.scheduler = SCHEDULERS[scheduler]()
        if self.flow and scheduler in FLOW[1:]:
            pipe.scheduler = type(pipe.scheduler)(**FLOW_DPM, use_dynamic_shifting=True)
        return pipe

    def verdict(self, scheduler: str) -> Verdict | None:
        return DRIVEN if scheduler in self.schedulers else self.others.get(scheduler)


SCALED = stock("changes its latents in another way")
PIPELINES = [
    Pipeline("StableDiffusion", "stable_diffusion", NOISE),
    Pipeline("StableDiffusionImg2Img", "stable_diffusion_img2img", NOISE),
    Pipeline("StableDiffusionInpaint", "stable_diffusion_inpaint", NOISE),
    Pipeline("StableDiffusionInpaint, 9 channels", "stable_diffusion_inpaint_9", NOISE),
    Pipeline("StableDiffusionControlNet", "stable_diffusion_controlnet", NOISE),
    Pipeline("StableDiffusionControlNet, several", "stable_diffusion_controlnet_2", NOISE),
    Pipeline("StableDiffusionXL", "stable_diffusion_xl", NOISE),
    Pipeline("StableDiffusionXLImg2Img", "stable_diffusion_xl_img2img", NOISE),
    Pipeline("StableDiffusionXLInpaint", "stable_diffusion_xl_inpaint", NOISE),
    Pipeline("StableDiffusionXLInpaint, 9 channels", "stable_diffusion_xl_inpaint_9", NOISE),
    Pipeline("StableDiffusion3", "stable_diffusion_3", FLOW, flow=True),
    Pipeline("Flux", "flux", FLOW, flow=True),
    Pipeline("Flux, guidance-distilled", "flux_guidance", FLOW, flow=True),
    Pipeline("PixArtAlpha", "pixart", NOISE),
    Pipeline(
        "DiT",
        "dit",
        ("DDIM", "DPM-Solver++ (1, 2)", "DDPM", "PNDM", "UniPC"),
        dict.fromkeys(("Euler", "Euler ancestral"), SCALED),
    ),
    Pipeline("DDIM", "ddim", ("DDIM",)),
    Pipeline("DDPM", "ddpm", tuple(name for name in SCHEDULERS if name not in ("PNDM", "UniPC"))),
]
BY_NAME = {pipeline.name: pipeline for pipeline in PIPELINES}


@dataclass(frozen=True)
class Feature:
    """A row of the second table: something a call asks for, run on rows of the first with their first scheduler.

    call: arguments beside the pipeline's own. prepare: (pipe) -> further arguments or None; may change the pipe.
    build: makes another pipe than the row's.
    """

    name: str
    pipelines: tuple[str, ...]
    call: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], dict[str, Any] | None] = lambda pipe: None
    build: Callable[[], Any] | None = None
    verdict: Verdict = DRIVEN


UNETS = ("StableDiffusion", "StableDiffusionXL")
GUIDED = (*UNETS, "StableDiffusion3", "PixArtAlpha")
TEXT = (*GUIDED, "Flux")
# UNets and transformers
BOTH_KINDS = (*UNETS, "StableDiffusion3", "Flux")


def _scheduler(make: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda pipe: setattr(pipe, "scheduler", make())


def _ip_adapter(pipe: Any) -> dict[str, Any]:
    return {"ip_adapter_image_embeds": tiny.add_ip_adapter(pipe)}


def _scaled_lora(pipe: Any) -> dict[str, Any]:
    tiny.add_lora(denoiser(pipe))
    name = "cross_attention_kwargs" if hasattr(pipe, "unet") else "joint_attention_kwargs"
    return {name: {"scale": 0.3}}


def needs_diffusers(version: str, why: str) -> None:
    """Skip a test that an older diffusers does not pass by itself."""
    if Version(diffusers.__version__) < Version(version):
        pytest.skip(f"{why} before diffusers {version}")


def _group_offload(pipe: Any) -> None:
    needs_diffusers("0.40", "group offloading needs an accelerator")
    denoiser(pipe).enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def _latents(pipe: Any) -> dict[str, Any]:
    return {"latents": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))}


def _change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 1.05} if step == 3 else tensors


def _unlisted(pipeline: str, cls: Any, **call: Any) -> Feature:
    """A class whose loop is not known, from the parts of a tiny pipeline."""
    build = tiny.PIPELINES[BY_NAME[pipeline].tiny][0]
    name = f"a pipeline not listed: {cls.__name__.removesuffix('Pipeline')}"
    return Feature(name, (pipeline,), call, build=lambda: tiny.ready(cls(**build().components)))


V_PREDICTION = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
_zero_snr = _scheduler(lambda: DDIMScheduler(**tiny.SD_NOISE, **V_PREDICTION))
_karras = _scheduler(lambda: DPMSolverMultistepScheduler(**VP, use_karras_sigmas=True, solver_type="heun"))
_shifting = _scheduler(lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
_heun = _scheduler(lambda: HeunDiscreteScheduler(**VP))
_sde = _scheduler(lambda: DPMSolverMultistepScheduler(**VP, algorithm_type="sde-dpmsolver++"))
_prk = _scheduler(lambda: PNDMScheduler(**VP))
_third = _scheduler(lambda: DPMSolverMultistepScheduler(**VP, solver_order=3))
_deis = _scheduler(lambda: DEISMultistepScheduler(**VP, solver_order=3))
_lms = _scheduler(lambda: LMSDiscreteScheduler(**VP))
_lcm, _tcd = _scheduler(lambda: LCMScheduler(**VP)), _scheduler(lambda: TCDScheduler(**VP))
BOTH_ENDS = {"denoising_start": 0.2, "denoising_end": 0.8}
FEATURES = [
    Feature("guidance", GUIDED, {"guidance_scale": 4.0}),
    Feature("no guidance", GUIDED, {"guidance_scale": 1.0}),
    Feature("true guidance (two calls a step)", ("Flux",), {"true_cfg_scale": 3.0, "negative_prompt": "dog"}),
    Feature("negative prompt", TEXT, {"negative_prompt": "dog"}),
    Feature("`guidance_rescale`", UNETS, {"guidance_rescale": 0.7}),
    Feature("several prompts and images", TEXT, {"prompt": ["a", "b"], "num_images_per_prompt": 2}),
    Feature("a generator per sample", TEXT, {"prompt": ["a", "b"], "generator": [1, 2]}),
    Feature("given latents", UNETS, prepare=_latents),
    Feature("given latents of another size", ("StableDiffusion",), {"height": 40, "width": 24}),
    Feature("several classes", ("DiT",), {"class_labels": [1, 5, 9]}),
    Feature("classes without guidance", ("DiT",), {"class_labels": [1, 5], "guidance_scale": 1.0}),
    Feature("one step", (*TEXT, "DiT", "DDIM"), {"num_inference_steps": 1}),
    Feature("v-prediction, zero terminal SNR", ("StableDiffusion",), prepare=_zero_snr),
    Feature("Karras sigmas", UNETS, prepare=_karras),
    Feature("Heun (two calls a step)", ("StableDiffusion", "StableDiffusionXLImg2Img"), prepare=_heun),
    Feature("DPM-Solver++ SDE", UNETS, prepare=_sde),
    Feature("PNDM with Runge-Kutta steps (four calls a step)", ("StableDiffusion",), prepare=_prk),
    Feature("DPM-Solver++ of order 3", ("StableDiffusion", "StableDiffusionXLImg2Img"), prepare=_third),
    Feature("DEIS of order 3", ("StableDiffusion",), prepare=_deis),
    Feature("LMS", ("StableDiffusion", "StableDiffusionImg2Img"), prepare=_lms),
    Feature("LCM", ("StableDiffusion",), prepare=_lcm),
    Feature("TCD with `eta`", ("StableDiffusion",), {"eta": 0.5}, _tcd),
    Feature("dynamic shifting", ("StableDiffusion3", "Flux"), prepare=_shifting),
    Feature("given `timesteps`", UNETS, {"timesteps": [900, 700, 500, 300, 150, 50]}, _scheduler(SCHEDULERS["Euler"])),
    Feature("given `sigmas`", ("StableDiffusion3", "Flux"), {"sigmas": [1.0, 0.8, 0.6, 0.4, 0.2, 0.1]}),
    Feature("`eta` > 0 (DDIM)", ("StableDiffusion", "DDIM"), {"eta": 0.7}),
    Feature("`denoising_end`", ("StableDiffusionXL",), {"denoising_end": 0.6}),
    Feature("`denoising_start`", ("StableDiffusionXLImg2Img",), {"denoising_start": 0.4}),
    Feature("`denoising_start` and `_end`", ("StableDiffusionXLInpaint",), BOTH_ENDS),
    Feature("another `strength`", ("StableDiffusionImg2Img", "StableDiffusionInpaint"), {"strength": 0.5}),
    Feature("`guess_mode`", ("StableDiffusionControlNet",), {"guess_mode": True}),
    Feature("`controlnet_conditioning_scale`", ("StableDiffusionControlNet",), {"controlnet_conditioning_scale": 0.4}),
    Feature("IP-Adapter", UNETS, prepare=_ip_adapter),
    Feature("LoRA", BOTH_KINDS, prepare=lambda pipe: tiny.add_lora(denoiser(pipe))),
    Feature("LoRA with a scale", BOTH_KINDS, prepare=_scaled_lora),
    Feature("FreeU", UNETS, prepare=lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)),
    Feature("group offload (eagerly, with `engine_reason`)", ("StableDiffusion", "Flux"), prepare=_group_offload),
    Feature("`callback_on_step_end` that looks", BOTH_KINDS, {"callback_on_step_end": look}),
    Feature(
        "`callback_on_step_end` that changes something",
        BOTH_KINDS,
        {"callback_on_step_end": _change},
        verdict=Verdict("step by step from there", "the callback changed"),
    ),
    Feature(
        "a pipeline not listed: InstructPix2Pix",
        ("StableDiffusionImg2Img",),
        build=tiny.stable_diffusion_instruct,
    ),
    _unlisted("PixArtAlpha", PixArtSigmaPipeline),
    _unlisted("Flux", FluxImg2ImgPipeline, image=tiny.image(16), strength=0.8),
    _unlisted("StableDiffusion3", StableDiffusion3Img2ImgPipeline, image=tiny.image(), strength=0.8),
    Feature(
        "the deprecated `callback`",
        ("StableDiffusion", "PixArtAlpha"),
        {"callback": lambda *given: None, "callback_steps": 1},
        verdict=stock("sees every step's latents"),
    ),
    Feature(
        "`control_guidance_start`, `_end`",
        ("StableDiffusionControlNet",),
        {"control_guidance_start": 0.2},
    ),
    Feature(
        "`skip_guidance_layers`",
        ("StableDiffusion3",),
        {"skip_guidance_layers": [1]},
    ),
    Feature(
        "a cache on the network (`enable_cache`)",
        ("Flux",),
        prepare=lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1)),
        verdict=stock("takes the previous call for the previous step"),
    ),
]

REPLACEMENTS = {
    "KarrasVe": "EDMEulerScheduler",
}


def tables() -> str:
    """The guide's tables."""
    lines = ["| pipeline | " + " | ".join(SCHEDULERS) + " |", "| --- |" + " --- |" * len(SCHEDULERS)]
    for pipeline in PIPELINES:
        verdicts = (pipeline.verdict(scheduler) for scheduler in SCHEDULERS)
        cells = ["" if verdict is None else "yes" if verdict == DRIVEN else verdict.kind for verdict in verdicts]
        lines.append(f"| {pipeline.name} | " + " | ".join(cells) + " |")
    lines += ["", "| a call with | becomes | tested on |", "| --- | --- | --- |"]
    for feature in FEATURES:
        lines.append(f"| {feature.name} | {feature.verdict} | {', '.join(feature.pipelines)} |")
    lines += ["", "| refused scheduler | the line in the error is |", "| --- | --- |"]
    for names, other in REPLACEMENTS.items():
        lines.append(f"| {names} | `pipe.scheduler = diffusers.{other}.from_config(pipe.scheduler.config)` |")
    return "\n".join(lines)


BEGIN, END = "<!-- tables from tests/support.py -->", "<!-- end of the tables -->"


def written(readme: str) -> str:
    """The guide with the tables in their place."""
    return f"{readme.partition(BEGIN)[0]}{BEGIN}\n\n{tables()}\n\n{END}{readme.partition(END)[2]}"


if __name__ == "__main__":
    GUIDE.write_text(written(GUIDE.read_text()))
