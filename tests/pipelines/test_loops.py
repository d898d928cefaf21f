"""Which denoising loops are understood, read from the source of diffusers and of small loops written for one rule."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import diffusers
import pytest
import torch

from srds_fast.pipelines.lockstep.source_check import unknown_in_loop, unknown_in_source

ACCEPTED = [
    "AuraFlowPipeline", "DDIMPipeline", "DDPMPipeline", "FluxImg2ImgPipeline", "FluxPipeline", "HunyuanDiTPipeline",
    "HunyuanVideoPipeline", "KandinskyV22Pipeline", "LTXPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline",
    "QwenImagePipeline", "SanaPipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionImg2ImgPipeline", "StableDiffusionInstructPix2PixPipeline", "StableDiffusionPipeline",
    "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline",
    "pipelines.kolors.pipeline_kolors.KolorsPipeline",
]  # fmt: skip

NO_LOOP = "no loop around scheduler.step"
NOT_ONE_LOOP = "not one plain loop around scheduler.step"
INDEX = "uses the step number i at line"
TIME = "uses the timestep at line"
REFUSED = {
    "AnimateDiffPipeline": NOT_ONE_LOOP,
    "CogView4Pipeline": "callback_on_step_end(self, i, self.scheduler.sigmas[i], callback_kwargs)",
    "StableDiffusionParadigmsPipeline": NO_LOOP,
    "KandinskyPriorPipeline": "is not `for i, t in enumerate(timesteps)`",
    "LuminaPipeline": "`1 - current_timestep / self.scheduler.config.num_train_timesteps`",
    "OmniGenPipeline": "calls torch.split",
    "SanaSprintPipeline": "`torch.sin(timestep)`",
    "StableDiffusion3Pipeline": "`i > num_inference_steps * skip_layer_guidance_start`",
    "StableDiffusionLatentUpscalePipeline": "`self.scheduler.sigmas[i]`",
    "StableDiffusionSAGPipeline": "`self.pred_x0(latents, noise_pred_uncond, t)`",
    "StableDiffusion3InpaintPipeline": "`i < len(timesteps) - 1`",
    "StableDiffusionPAGPipeline": TIME,
    "StableDiffusionPanoramaPipeline": NOT_ONE_LOOP,
    "StableDiffusionXLControlNetPipeline": INDEX,
    "UniDiffuserPipeline": "_get_noise_pred",
    "WanPipeline": INDEX,
}


def pipeline(name: str) -> Any:
    """A pipeline class by its name in diffusers, or by its path where it is exported with other packages only."""
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(f"diffusers.{module}") if module else diffusers, name)


@pytest.mark.parametrize("name", ACCEPTED)
def test_plain_loops_of_diffusers_are_understood(name: str) -> None:
    assert unknown_in_loop(pipeline(name).__call__) is None


@pytest.mark.parametrize(("name", "reason"), REFUSED.items(), ids=REFUSED)
def test_other_loops_of_diffusers_are_refused_with_what_is_in_them(name: str, reason: str) -> None:
    assert reason in (unknown_in_loop(pipeline(name).__call__) or "")


PLAIN = """
    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=50, callback_on_step_end=None, **kwargs):
        callback = kwargs.pop("callback", None)
        latents = self.prepare_latents(prompt)
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                model_input = torch.cat([latents] * 2) if self.guided else latents
                model_input = self.scheduler.scale_model_input(model_input, t)
                timestep = t.expand(model_input.shape[0]).to(latents.dtype)
                if ip_adapter_image is not None:
                    added["image_embeds"] = image_embeds
                noise_pred = self.unet(model_input, timestep=timestep / 1000, cond=added)[0]
                if self.guided:
                    uncond, text = noise_pred.chunk(2)
                    noise_pred = uncond + self.guidance_scale * (text - uncond)
                latents_dtype = latents.dtype
                latents = self.scheduler.step(noise_pred, t, latents, **extra, return_dict=False)[0]
                if latents.dtype != latents_dtype:
                    latents = latents.to(latents_dtype)
                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for k in callback_on_step_end_tensor_inputs:
                        callback_kwargs[k] = locals()[k]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)
                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()
                    if callback is not None and i % callback_steps == 0:
                        step_idx = i // getattr(self.scheduler, "order", 1)
                        callback(step_idx, t, latents)
        return self.vae.decode(latents / self.vae.config.scaling_factor)
"""
LOOP = "for i, t in enumerate(timesteps):"
HEAD = "self._current_timestep = t"
STEP = "latents = self.scheduler.step(noise_pred, t, latents, **extra, return_dict=False)[0]"
GUIDE = "latents_dtype = latents.dtype"
END = "if latents.dtype != latents_dtype:"
UNET = "self.unet(model_input, timestep=timestep / 1000, cond=added)[0]"
RETURN = "return self.vae"


def changed(old: str, new: str) -> str | None:
    """The verdict on the plain loop with one piece of it replaced."""
    assert PLAIN.count(old) == 1
    return unknown_in_source(PLAIN.replace(old, new))


def with_line(before: str, line: str) -> str | None:
    """The verdict on the plain loop with one more line."""
    indent = next(len(each) - len(each.lstrip()) for each in PLAIN.splitlines() if each.lstrip().startswith(before))
    return changed(before, f"{line}\n{' ' * indent}{before}")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (LOOP, "for i, t in self.progress_bar(enumerate(timesteps)):"),
        (LOOP, "for i, t in enumerate(self.progress_bar(timesteps)):"),
        (STEP, "latents = self.scheduler.step(noise_pred, t, latents).prev_sample"),
        (STEP, "latents = self.scheduler.step(model_output=noise_pred, timestep=t, sample=latents)[0]"),
        ("timestep = t.expand(model_input.shape[0])", "timestep = torch.tensor([t] * model_input.shape[0])"),
        ("timestep / 1000", "timestep * self.transformer.config.timestep_scale"),
        (UNET, "self.unet(model_input, timestep, cond=added).sample.float()"),
        ("uncond, text = noise_pred.chunk(2)", "uncond, text = noise_pred.float().chunk(2, dim=0)"),
    ],
)
def test_plain_forms_are_understood(old: str, new: str) -> None:
    assert unknown_in_source(PLAIN) is None
    assert changed(old, new) is None


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        # the loop
        (LOOP, "for i, (t, s) in enumerate(timesteps):", "is not `for i, t in enumerate(timesteps)`"),
        (LOOP, "for i, t in enumerate(zip(timesteps, sigmas)):", "is not `for i, t in enumerate(timesteps)`"),
        (LOOP, "while self.more():", NOT_ONE_LOOP),
        (STEP, "latents = self.denoise(latents, t)", NO_LOOP),
        (STEP, "for _ in range(2):\n                    " + STEP, NOT_ONE_LOOP),
        ("with self.progress_bar(total=num_inference_steps) as", "for", NOT_ONE_LOOP),
        (RETURN, "latents = self.scheduler.step(latents, 0, latents)[0]\n        " + RETURN, NOT_ONE_LOOP),
        # the step
        (STEP, f"{STEP}\n                {STEP}", "does not just step one sample"),
        (STEP, STEP.replace("latents =", "latents, denoised =").replace("[0]", ""), "does not just step one sample"),
        (STEP, STEP.replace("t, latents", "t, latents[:, :4]"), "does not just step one sample"),
        (STEP, STEP.replace("self.scheduler", "audio_scheduler"), TIME),
        # callbacks
        ("callback_on_step_end(self, i, t, ", "callback_on_step_end(self, i, sigmas[i], ", "self, i, sigmas[i], "),
        ("callback_kwargs[k] = locals()[k]", "callback_kwargs[k] = k", INDEX),
        ('latents = callback_outputs.pop("latents", latents)', "callback_outputs.clear()", INDEX),
        ('latents = callback_outputs.pop("latents", latents)', "x = callback_outputs.pop('x', x)", "other names"),
        ("if callback is not None and", "if callback is not None or", INDEX),
        ("progress_bar.update()", "progress_bar.update(); latents = latents * 2", INDEX),
        # the denoiser
        (UNET, "self.prior(model_input)[0]", "calls self.prior"),
        (UNET, "model_input", "calls neither self.unet nor self.transformer"),
        (UNET, f"{UNET} + self.transformer(model_input, t)[0]", "calls self.transformer and self.unet"),
        (UNET, "self.unet(model_input, timestep=timestep, r=timestep)[0]", "`r=timestep`"),
        (UNET, "self.unet(model_input, timestep=1 - timestep / 1000)[0]", "`1 - timestep / 1000`"),
    ],
)  # fmt: skip
def test_a_changed_piece_is_refused(old: str, new: str, reason: str) -> None:
    if old.startswith("with"):
        old, new = old + " progress_bar:", "for _ in range(2):"
    assert reason in (changed(old, new) or "")


@pytest.mark.parametrize(
    ("before", "line", "reason"),
    [
        # the step number
        (GUIDE, "noise_pred = noise_pred * scales[i]", "`scales[i]`"),
        # the timestep
        (GUIDE, "noise_pred = noise_pred if t > 500 else -noise_pred", "`t > 500`"),
        (GUIDE, "noise_pred = self.scheduler.add_noise(noise_pred, noise, t)", TIME),
        (GUIDE, "noise_pred = noise_pred * self._current_timestep", "looks at the timestep"),
        (GUIDE, "noise_pred = noise_pred * timesteps.max()", "calls timesteps.max"),
        (GUIDE, "noise_pred = noise_pred * timesteps", "looks at the timesteps"),
        (GUIDE, "noise_pred = noise_pred * self.scheduler.sigmas", "looks at the scheduler"),
        # the sample
        (HEAD, "latents = latents - grad", "changes latents"),
        (HEAD, "latents[:, :4] = mask", "stores something"),
        (END, "latents = latents * mask + init * (1 - mask)", "reads latents after the step"),
        # other calls
        (GUIDE, "noise_pred = noise_pred + torch.randn_like(noise_pred)", "calls torch.randn_like"),
        (GUIDE, "noise_pred = noise_pred / torch.norm(noise_pred)", "calls torch.norm"),
        # the batch
        (GUIDE, "noise_pred = noise_pred[:batch_size]", "tells the entries of the batch apart"),
        (GUIDE, "noise_pred = noise_pred * latents.shape[0]", "tells the entries of the batch apart"),
        (GUIDE, "noise_pred = noise_pred * len(noise_pred)", "calls len"),
        (GUIDE, "noise_pred = noise_pred @ mixing", "has a matrix product"),
        # what is kept
        (GUIDE, "noise_pred = noise_pred + last; last = noise_pred", "keeps last for the next turn"),
        (GUIDE, "self.last = noise_pred", "stores something"),
        (GUIDE, "added['last'] = noise_pred", "stores something"),
        (RETURN, "latents = latents + noise_pred", "keeps noise_pred for after the loop"),
        (RETURN, "latents = latents * t", "keeps t for after the loop"),
        # statements and expressions
        (GUIDE, "noise_pred += guidance", "has a statement that is not understood"),
        (GUIDE, "noise_pred = [each for each in noise_pred]", "has an expression that is not understood"),
        # around the loop
        (RETURN, "known = isinstance(self.scheduler, DDIMScheduler)", "asks for the class of a component"),
        ("timesteps = self", "self.scheduler.timesteps = chosen", "changes or renames a component"),
        ("timesteps = self", "callback_on_step_end = self.watch", "has a callback of its own"),
    ],
)  # fmt: skip
def test_one_more_line_is_refused(before: str, line: str, reason: str) -> None:
    assert reason in (with_line(before, line) or "")


def test_the_reason_names_the_line_of_the_file() -> None:
    found = with_line(GUIDE, "noise_pred = noise_pred * scales[i]") or ""
    line = next(number for number, text in enumerate(PLAIN.splitlines(), start=1) if GUIDE in text)
    assert f"at line {line} " in found
    source = PLAIN.replace(GUIDE, "noise_pred = noise_pred * scales[i]")
    assert f"at line {line + 99} " in (unknown_in_source(source, first_line=100) or "")


def test_a_replaced_call_is_refused() -> None:
    original = diffusers.StableDiffusionPipeline.__call__
    cached = functools.wraps(original)(lambda *args, **kwargs: original(*args, **kwargs))
    assert cached.__module__.startswith("diffusers.")
    replaced = "its __call__ was replaced by code of"
    for call in (cached, torch.no_grad()(cached)):
        assert unknown_in_loop(call) == f"{replaced} {__name__}"
    assert unknown_in_loop(torch.no_grad()(original)) is None
    assert unknown_in_loop(functools.partial(original, None)) == f"{replaced} functools"


def test_a_call_without_source_is_refused() -> None:
    scope: dict[str, Any] = {"__name__": "diffusers.made_up"}
    exec("def __call__(self): pass", scope)
    assert unknown_in_loop(scope["__call__"]) == "the source of its __call__ is not available"
