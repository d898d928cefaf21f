"""The drop-in among everything else a user does with a pipeline: bad input, adapters, other pipelines, threads."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import calls
import numpy as np
import pytest
import tiny
import torch
from accelerate import cpu_offload
from calls import assert_close, drive, everything, instances
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffusers.hooks import apply_first_block_cache
from peft.utils import get_peft_model_state_dict
from support import needs_diffusers

import srds_fast
from bench.workloads.classes import CASES
from srds_fast import InvalidArgument, UnsupportedPipeline
from srds_fast.pipelines.lockstep.loop import LockstepLoop

STEPS = 9
latents = partial(calls.latents, prompt="a cat")


def assert_same_image(found: list[Any], expected: list[Any]) -> None:
    """Equal but for one grey level."""
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)).max() <= 1


BAD_CALLS: dict[str, tuple[dict[str, Any], type[BaseException]]] = {
    "no-steps": ({"num_inference_steps": 0}, InvalidArgument),
    "too-many-steps": ({"num_inference_steps": 10**9}, InvalidArgument),
    "steps-of-the-wrong-type": ({"num_inference_steps": "ten"}, TypeError),
    "more-steps-than-trained": ({"num_inference_steps": 2000}, ValueError),
    "generators": ({"prompt": ["a", "b"], "generator": [torch.Generator() for _ in range(3)]}, ValueError),
    "prompt": ({"prompt": 7}, ValueError),
    "no-prompt": ({"prompt": None}, ValueError),
    "size": ({"height": 33, "width": 33}, ValueError),
    "latents": ({"latents": torch.zeros(1, 3, 16, 16)}, RuntimeError),
    "eta": ({"eta": float("nan")}, Exception),
    "callback": ({"callback_on_step_end": 5}, TypeError),
}


@pytest.mark.parametrize(("call", "error"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_a_bad_call_is_a_typed_error_or_stocks_own(sd: Any, call: dict[str, Any], error: type[BaseException]) -> None:
    fast = srds_fast.compile(sd, method="srds")
    before = everything(sd)
    call = {"prompt": "a cat", "num_inference_steps": STEPS, **call}
    with pytest.raises(error) as found:
        fast(**call)
    if not isinstance(found.value, srds_fast.SrdsFastError):
        with pytest.raises(type(found.value)) as expected:
            sd(**call)
        assert str(found.value) == str(expected.value)
    assert everything(sd)["parts"] == before["parts"]
    assert_close(latents(fast), latents(sd), 1e-2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_blocks": 2.5}, "num_blocks is 2.5"),  # one of the settings: see tests/planner
        ({"strict": 1}, "strict is 1"),
        ({"exact": True, "max_iterations": 2}, "exact=True was given together with max_iterations=2"),
        ({"plan": "plan.json"}, "plan is a str"),
    ],
)
def test_bad_settings_are_refused_at_compile(sd: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        srds_fast.compile(sd, **{"method": "srds", **settings})


def test_a_call_leaves_nothing_behind(sd: Any) -> None:
    latents(sd)
    before = everything(sd)
    fast = srds_fast.compile(sd, method="srds")
    latents(fast)
    list(fast.stream("a cat", num_inference_steps=STEPS))
    assert everything(sd) == before


@pytest.mark.parametrize("path", ["takeover", "drive"])
def test_the_proxies_are_freed_with_the_call(sd: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that kept its states alive would leak latents on every request."""
    made = instances(monkeypatch, LockstepLoop, weakref.ref)
    if path == "drive":
        drive(monkeypatch)
    fast = srds_fast.compile(sd, method="srds")
    for _ in range(2):
        latents(fast)
        assert fast.report.path == path
    gc.collect()
    assert len(made) == 2
    assert all(reference() is None for reference in made)


def test_adapters_loaded_swapped_scaled_and_unloaded_between_calls() -> None:
    pipe = tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, exact=True, method="srds")
    results = []

    def same_as_stock(**call: Any) -> None:
        results.append(latents(pipe, **call, num_inference_steps=4))
        assert_close(latents(fast, **call, num_inference_steps=4), results[-1])

    same_as_stock()
    files = []
    for seed in (1, 2):
        donor = tiny.stable_diffusion()
        tiny.add_lora(donor.unet, seed=seed)
        files.append({f"unet.{name}": value for name, value in get_peft_model_state_dict(donor.unet).items()})
    fast.load_lora_weights(dict(files[0]), adapter_name="first")
    same_as_stock()
    same_as_stock(cross_attention_kwargs={"scale": 0.3})
    fast.load_lora_weights(dict(files[1]), adapter_name="second")
    fast.set_adapters("second")
    same_as_stock()
    pipe.set_adapters(["first", "second"], [0.4, 0.7])
    same_as_stock()
    fast.fuse_lora()
    same_as_stock()
    fast.unfuse_lora()
    fast.disable_lora()
    same_as_stock()
    fast.unload_lora_weights()
    same_as_stock()
    assert_close(results[-1], results[0])
    assert all(not torch.allclose(one, results[0], rtol=1e-3) for one in results[1:5])
    embeds = tiny.add_ip_adapter(pipe)
    for scale in (1.0, 0.2):
        fast.set_ip_adapter_scale(scale)
        same_as_stock(ip_adapter_image_embeds=embeds)


@pytest.mark.parametrize(
    ("make", "cls"),
    [
        (StableDiffusionImg2ImgPipeline.from_pipe, StableDiffusionImg2ImgPipeline),
        (AutoPipelineForImage2Image.from_pipe, StableDiffusionImg2ImgPipeline),
        (AutoPipelineForInpainting.from_pipe, StableDiffusionInpaintPipeline),
    ],
    ids=["from_pipe", "auto", "auto-inpaint"],
)
def test_other_pipelines_are_made_from_a_compiled_one(sd: Any, make: Callable[[Any], Any], cls: type) -> None:
    made = make(srds_fast.compile(sd, method="srds"))
    assert type(made) is cls
    assert made.unet is sd.unet
    call = {"image": tiny.image(), "num_inference_steps": 5}
    if cls is StableDiffusionInpaintPipeline:
        call["mask_image"] = tiny.mask()
    assert_close(latents(srds_fast.compile(made, exact=True, method="srds"), **call), latents(made, **call))


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_every_pipeline_streams_whole_images_of_its_own(name: str) -> None:
    build, call = tiny.PIPELINES[name]
    call = {**call, "num_inference_steps": 6}
    call.pop("output_type")
    fast = srds_fast.compile(build(), max_iterations=2, tolerance=0.0, num_blocks=3, method="srds")
    torch.manual_seed(3)
    seen = list(fast.stream(**call, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(3)
    expected = fast(**call, generator=torch.Generator().manual_seed(0)).images
    assert [refinement.iteration for refinement in seen] == [0, 1, 2]
    assert {len(refinement.images) for refinement in seen} == {len(expected)}
    assert_same_image(seen[-1].images, expected)
    assert seen[0].change is None
    assert [each.change for each in seen[1:]] == fast.report.change
    shape = tuple(seen[1].latents.shape)
    assert f"Refinement(kind='iteration', iteration=1, latents={shape}, change=[" in repr(seen[1])


@pytest.mark.parametrize("name", ["stable_diffusion_inpaint", "flux", "dit"])
def test_one_step_after_another_streams_predicted_images(name: str) -> None:
    build, call = tiny.PIPELINES[name]
    call = {**call, "num_inference_steps": 4}
    call.pop("output_type")
    fast = srds_fast.compile(build(), method="sequential")
    *previews, last = fast.stream(**call, generator=torch.Generator().manual_seed(0))
    expected = fast(**call, generator=torch.Generator().manual_seed(0)).images
    assert [(each.kind, each.iteration) for each in previews] == [("x0 preview", done) for done in (1, 2, 3)]
    assert [len(each.images) for each in previews] == [len(expected)] * 3
    assert_same_image(last.images, expected)
    distances = [float((each.latents - last.latents).abs().mean()) for each in previews]
    assert distances[-1] < distances[0]


@pytest.mark.parametrize(
    "name",
    [
        "LatentConsistencyModelPipeline",  # decodes what its last step returns beside the sample
        "WanPipeline",  # videos
        "QwenImagePipeline",  # its own loop makes the turns
        pytest.param("StableDiffusionXLInpaintPipeline, 4 channels", marks=pytest.mark.exhaustive),
        pytest.param("AudioLDM2Pipeline", marks=pytest.mark.exhaustive),
        pytest.param("HiDreamImagePipeline", marks=pytest.mark.exhaustive),
    ],
)
def test_a_preview_of_any_class_is_what_its_own_code_makes_of_the_latents(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    call = {**case.call, "num_inference_steps": 4}
    call.pop("output_type", None)
    fast = srds_fast.compile(pipe, method="srds", exact=True)
    encoders = [part for name, part in vars(pipe).items() if name.startswith("text_encoder") and part is not None]
    state = torch.get_rng_state()
    *_, last = fast.stream(**call, generator=torch.Generator().manual_seed(0))
    torch.set_rng_state(state)
    with ExitStack() as hooked:
        for each in encoders:
            handle = each.register_forward_hook(lambda *given: pytest.fail("encoded again"))
            hooked.callback(handle.remove)
        found = last.images
    assert torch.equal(torch.get_rng_state(), state)
    shown = {"output_type": "pil"} if "output_type" in inspect.signature(type(pipe).__call__).parameters else {}
    expected = pipe(**call, **shown, generator=torch.Generator().manual_seed(0))[0]
    for ours, theirs in zip(found, expected, strict=True):
        assert np.shape(ours) == np.shape(theirs)
        assert_same_image([ours], [theirs])


def test_previews_of_a_half_precision_vae_leave_it_as_it_is() -> None:
    """SDXL's VAE overflows in float16; the stock call casts it to and fro, a preview decodes with a copy."""
    pipe = tiny.stable_diffusion_xl().to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    fast = srds_fast.compile(pipe, max_iterations=1, tolerance=0.0, method="srds")
    call = {"prompt": "a cat", "num_inference_steps": STEPS}
    *_, last = fast.stream(**call, generator=torch.Generator().manual_seed(0))
    preview = last.images
    assert pipe.vae.dtype == torch.float16
    assert_same_image(preview, fast(**call, generator=torch.Generator().manual_seed(0)).images)


def test_a_first_block_cache_applied_by_hand_is_recognised() -> None:
    """Applied to the network itself, it does not set is_cache_enabled."""
    pipe = tiny.flux()
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.05))
    fast = srds_fast.compile(pipe, method="srds")
    call = tiny.PIPELINES["flux"][1]
    found = latents(fast, **call)
    assert "a cache is enabled on the transformer" in fast.report.fallback_reason
    assert_close(found, latents(pipe, **call))


OFFLOADS: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    # what enable_sequential_cpu_offload does to every part
    "sequential": lambda pipe: cpu_offload(pipe.unet, execution_device=torch.device("cpu")),
    "group": lambda pipe: pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=list(OFFLOADS))
def test_offloading_is_named_as_the_reason_for_the_eager_engine(offload: Callable[[Any], None]) -> None:
    if offload is OFFLOADS["group"]:
        needs_diffusers("0.40", "group offloading needs an accelerator")
    pipe = tiny.stable_diffusion()
    expected = latents(pipe, num_inference_steps=3)
    fast = srds_fast.compile(pipe, exact=True, method="srds")
    assert_close(latents(fast, num_inference_steps=3), expected)
    assert fast.report.engine_reason is None
    offload(fast)
    for _ in range(2):  # model offloading sets its hooks anew after every call
        assert_close(latents(fast, num_inference_steps=3), expected)
        assert "offloaded" in fast.report.engine_reason
        assert "(each wave is called from Python), because" in str(fast.report)
        assert_close(latents(pipe, num_inference_steps=3), expected)


def test_a_loop_that_cannot_be_driven_is_not_streamed_and_strict_refuses_it() -> None:
    """DiT overwrites its latents with what Euler scales: found out in the first step, after noise has been drawn."""
    pipe = tiny.dit(EulerDiscreteScheduler(**tiny.SD_BETAS, steps_offset=1))
    call: dict[str, Any] = {"class_labels": [3], "num_inference_steps": STEPS}
    with pytest.raises(UnsupportedPipeline, match="changes its latents in another way"):
        list(srds_fast.compile(pipe, method="srds").stream(**call))
    with pytest.raises(UnsupportedPipeline, match="changes its latents in another way"):
        srds_fast.compile(pipe, strict=True, method="srds")(**call)


def test_a_list_of_one_generator_draws_for_the_whole_batch_as_stock_does() -> None:
    pipe = tiny.ddpm()
    fast = srds_fast.compile(pipe, exact=True, method="srds")
    assert_close(*(calls.latents(each, [0], batch_size=3, output_type="pt") for each in (fast, pipe)))


def test_a_plan_knows_how_many_steps_strength_leaves() -> None:
    build, call = tiny.PIPELINES["stable_diffusion_img2img"]
    fast = srds_fast.compile(build(), tolerance=0.0, method="srds")
    for strength in (0.5, 0.8, 1.0):
        more = {**call, "num_inference_steps": 10, "strength": strength}
        latents(fast, **more)
        assert fast.plan_for(**more).num_inference_steps == fast.report.num_inference_steps == int(10 * strength)
    assert fast.plan_for(**call, num_inference_steps=10, strength=1.0).program().num_waves == fast.report.waves
    assert fast.plan_for(**call, num_inference_steps=30).coarse_solver == "2m"
    assert fast.plan_for(**call, num_inference_steps=30, eta=0.5).coarse_solver == "ddim"


@pytest.mark.parametrize("steps", [8, 10])
@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "StableDiffusion3Img2ImgPipeline"])
def test_a_plan_knows_how_a_family_rounds_its_strength(name: str, steps: int) -> None:
    case = CASES[name]
    fast = srds_fast.compile(case.build(), method="sequential")
    for strength in (0.35, 0.55, 0.9):
        call = {**case.call, "num_inference_steps": steps, "strength": strength}
        plan = fast.plan_for(**call)
        latents(fast, **{"prompt": "a cat", **call})
        assert plan.num_inference_steps == fast.report.num_inference_steps


SHARES: list[dict[str, Any]] = [
    {"denoising_end": 0.8},
    {"denoising_start": 0.7},
    {"denoising_start": 0.3, "denoising_end": 0.7},
    {"denoising_end": 0.6, "strength": 0.8},
    {"denoising_end": 1.0},
]


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("scheduler", [None, HeunDiscreteScheduler])
def test_a_plan_knows_how_many_steps_a_part_of_the_schedule_leaves(shares: dict[str, Any], scheduler: Any) -> None:
    name = "stable_diffusion_xl_img2img" if {"denoising_start", "strength"} & set(shares) else "stable_diffusion_xl"
    build, call = tiny.PIPELINES[name]
    pipe = build(scheduler and scheduler(**tiny.SD_BETAS))
    fast = srds_fast.compile(pipe, method="sequential")
    call = {**call, "num_inference_steps": 10, **shares}
    plan = fast.plan_for(**call)
    expected = latents(pipe, **call)
    assert_close(latents(fast, **call), expected)
    assert plan.num_inference_steps == fast.report.num_inference_steps
    given = srds_fast.compile(pipe, plan=plan)
    assert_close(latents(given, **call), expected)
    assert given.report.method == "sequential"


def test_a_call_without_a_step_has_a_report_and_no_plan() -> None:
    build, call = tiny.PIPELINES["stable_diffusion_img2img"]
    pipe = build()
    call = {**call, "num_inference_steps": 10, "strength": 0.05}
    fast = srds_fast.compile(pipe, method="srds", strict=True)
    assert torch.equal(latents(fast, **call), latents(pipe, **call))
    report = fast.report
    assert (report.num_inference_steps, report.waves, report.fallback_reason) == (0, 0, "its loop has no step")
    asked = (fast.plan_for, partial(fast.plan_for, measure=True), lambda **call: list(fast.stream(**call)))
    for ask in asked:
        with pytest.raises(InvalidArgument, match="its loop has no step"):
            ask(**call)
    assert fast.warmup(**call).waves == 0
    with_callback = {**call, "callback": lambda *given: None, "callback_steps": 1}
    loose = srds_fast.compile(pipe, method="srds")
    latents(loose, **with_callback)
    assert loose.report.num_inference_steps == 0


def test_calls_on_the_stock_loop_have_no_plan_and_a_failed_call_no_report(sd: Any) -> None:
    fast = srds_fast.compile(sd, method="srds", num_blocks=9)
    with pytest.raises(InvalidArgument, match="has no plan and no previews: callback was given"):
        fast.plan_for("a", callback=lambda *given: None)
    latents(fast)
    assert fast.report is not None
    with pytest.raises(InvalidArgument, match="num_blocks is 9 for 8 steps"):
        latents(fast, num_inference_steps=8)
    with pytest.raises(ValueError, match="divisible by 8"):
        latents(fast, height=33, width=33)
    assert fast.report is None


def test_a_deep_copy_is_a_drop_in_of_its_own(sd: Any) -> None:
    fast = srds_fast.compile(sd, exact=True, method="srds")
    twin = copy.deepcopy(fast)
    assert twin.unet is not fast.unet
    assert twin.original.unet is twin.unet
    assert torch.equal(latents(twin), latents(fast))
    assert twin.report.exact
