"""The drop-in among everything else a user does with a pipeline: bad input, adapters, other pipelines, threads."""

from __future__ import annotations

import copy
import gc
import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import support
import tiny
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffusers.hooks import apply_first_block_cache
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

import srds_fast
from srds_fast import DivergenceError, InvalidArgument, UnsupportedPipeline
from srds_fast.engine import run
from srds_fast.pipelines import families, networks
from srds_fast.pipelines.lockstep import loop as drive
from srds_fast.pipelines.lockstep.loop import Drive
from srds_fast.pipelines.takeover import takeover
from srds_fast.pipelines.tokenizers import Spares
from srds_fast.solvers.fixed_point import solver as fixed_point

STEPS = 9


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny.stable_diffusion()


def latents(pipe: Any, seed: int = 0, **call: Any) -> Tensor:
    call = {"prompt": "a cat", "num_inference_steps": STEPS, "output_type": "latent", **call}
    return pipe(**call, generator=torch.Generator().manual_seed(seed))[0]


def assert_close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= relative * float(expected.abs().max())


def everything(pipe: Any) -> dict[str, Any]:
    """What a call must not touch: components by identity, weights by version, hooks, scheduler state."""
    network = pipe.unet
    return {
        "parts": {name: id(part) for name, part in pipe.components.items()},
        "weights": [(id(each), each._version) for each in network.parameters()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules()],
        "forwards": ["forward" in vars(module) for module in network.modules()],
        "scheduler": {name: str(value) for name, value in vars(pipe.scheduler).items()},
        "config": str(pipe.config),
        "keys": set(vars(pipe)),
    }


BAD_CALLS: dict[str, tuple[dict[str, Any], type[BaseException]]] = {
    "no-steps": ({"num_inference_steps": 0}, InvalidArgument),
    "negative-steps": ({"num_inference_steps": -3}, InvalidArgument),
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
        with pytest.raises(type(found.value)):
            sd(**call)
    assert everything(sd)["parts"] == before["parts"]
    assert_close(latents(fast), latents(sd), 1e-2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"tolerance": -1}, "tolerance is -1"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_blocks": 2.5}, "num_blocks is 2.5"),
        ({"max_iterations": -1}, "max_iterations is -1"),
        ({"method": "fastest"}, "method is 'fastest'"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"exact": "yes"}, "exact is 'yes'"),
        ({"strict": 1}, "strict is 1"),
        ({"exact": True, "max_iterations": 2}, "exact=True was given together with max_iterations=2"),
        ({"plan": "plan.json"}, "plan is a str"),
    ],
)
def test_bad_settings_are_refused_at_compile(sd: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        srds_fast.compile(sd, **{"method": "srds", **settings})


def test_more_blocks_than_steps_are_refused_at_the_call(sd: Any) -> None:
    fast = srds_fast.compile(sd, num_blocks=20, method="srds")
    with pytest.raises(InvalidArgument, match="num_blocks is 20 for 9 steps"):
        latents(fast)
    assert_close(latents(fast, num_inference_steps=30), latents(sd, num_inference_steps=30), 1e-2)


class Fault:
    """Does something at the call of the denoiser with a number."""

    def __init__(self, network: nn.Module, at: int, act: Callable[[Tensor], Tensor]) -> None:
        self._left = at
        self._act = act
        self._handle = network.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._left -= 1
        return (self._act(output[0]), *output[1:]) if self._left == 0 else None

    def __enter__(self) -> Fault:
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()


def _raise(error: BaseException) -> Callable[[Tensor], Tensor]:
    def act(output: Tensor) -> Tensor:
        raise error

    return act


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], type[BaseException]]] = {
    "nan": (lambda output: output * float("nan"), DivergenceError),
    "one-sample-infinite": (lambda output: output.index_fill(0, torch.tensor([0]), float("inf")), DivergenceError),
    "runtime-error": (_raise(RuntimeError("broken")), RuntimeError),
    "keyboard-interrupt": (_raise(KeyboardInterrupt()), KeyboardInterrupt),
}


@pytest.mark.parametrize("at", [1, 2, 5, 8])
@pytest.mark.parametrize(("act", "error"), FAULTS.values(), ids=list(FAULTS))
def test_a_fault_at_any_wave_ends_in_its_error_and_the_next_call_works(
    sd: Any, act: Callable[[Tensor], Tensor], error: type[BaseException], at: int
) -> None:
    fast = srds_fast.compile(sd, exact=True, method="srds")
    expected = latents(sd)
    before = everything(sd)
    with Fault(sd.unet, at, act), pytest.raises(error) as caught:
        latents(fast)
    assert everything(sd) == before
    if isinstance(caught.value, DivergenceError):
        assert caught.value.report.waves >= at
    assert_close(latents(fast), expected)


@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_out_of_memory_at_any_wide_wave_ends_in_steps_of_one_row(sd: Any, at: int) -> None:
    fast = srds_fast.compile(sd, exact=True, method="srds")
    expected, before = latents(sd), everything(sd)
    with Fault(sd.unet, at, _raise(torch.OutOfMemoryError("no more"))):
        if at == 1:  # one row: the stock loop has no more room
            with pytest.raises(torch.OutOfMemoryError):
                latents(fast)
        else:
            assert_close(latents(fast), expected)
            assert fast.report.method == "sequential"
    assert everything(sd) == before
    assert_close(latents(fast), expected)
    assert fast.report.fallback_reason is None


class Room:
    """For the time of a `with`, memory for so many rows: wider calls of the network end as a full device ends them."""

    def __init__(self, network: nn.Module, rows: int) -> None:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            if len(kwargs.get("sample", args[0] if args else None)) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        self._handle = network.register_forward_pre_hook(look, with_kwargs=True)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()


@pytest.mark.parametrize("settings", [{"method": "srds"}, {"method": "collocation"}, {"method": "auto"}])
@pytest.mark.parametrize("path", ["takeover", "drive"])
def test_waves_that_do_not_fit_into_memory_are_taken_one_row_at_a_time(
    sd: Any, settings: dict[str, Any], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "drive":
        monkeypatch.setattr(takeover, "why_not", lambda loop: "to see it driven")
    expected, before = latents(sd), everything(sd)
    fast = srds_fast.compile(sd, **settings)
    with Room(sd.unet, 2):  # a row with guidance
        assert_close(latents(fast), expected)
        report = fast.report
        if settings["method"] == "auto" and path == "takeover":  # it has seen that when it measured
            assert report.method == "sequential"
            assert report.fallback_reason is None
        else:
            assert report.method == ("stock" if path == "drive" else "sequential")
            assert "did not fit" in report.fallback_reason
            assert "max_rows" in report.fallback_reason
            with pytest.raises(srds_fast.UnsupportedPipeline, match="did not fit"):
                latents(srds_fast.compile(sd, strict=True, **settings))
        narrow = srds_fast.compile(sd, method="srds", exact=True, max_rows=1)
        assert_close(latents(narrow), expected)
        assert narrow.report.fallback_reason is None
    assert everything(sd) == before


def test_what_the_waves_had_in_memory_is_let_go_before_the_steps_are_taken(
    sd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    made: list[weakref.ref[Any]] = []
    begin, steps = fixed_point.Points.__init__, run.step_by_step

    def watched(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        made.append(weakref.ref(self))

    def looking(*arguments: Any) -> Any:
        alive.append(sum(each() is not None for each in made))
        return steps(*arguments)

    monkeypatch.setattr(fixed_point.Points, "__init__", watched)
    monkeypatch.setattr(drive, "step_by_step", looking)
    fast = srds_fast.compile(sd, method="collocation")
    with Room(sd.unet, 2):
        latents(fast)
    assert (len(made), alive) == (1, [0])


def test_a_stream_that_runs_out_of_memory_goes_on_step_by_step(sd: Any) -> None:
    expected = latents(sd)
    fast = srds_fast.compile(sd, method="srds", exact=True)
    with Room(sd.unet, 2):
        *_, last = fast.stream("a cat", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    assert_close(torch.as_tensor(last.latents), expected)
    assert "did not fit" in fast.report.fallback_reason


def test_memory_that_decoding_lacks_is_not_blamed_on_the_waves(sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*arguments: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sd.vae, "decode", decode)
    fast = srds_fast.compile(sd, method="srds")
    with pytest.raises(torch.OutOfMemoryError):
        fast("a cat", num_inference_steps=STEPS)
    assert fast.report.fallback_reason is None


def test_a_call_leaves_nothing_behind(sd: Any) -> None:
    latents(sd)
    before = everything(sd)
    fast = srds_fast.compile(sd, method="srds")
    latents(fast)
    list(fast.stream("a cat", num_inference_steps=STEPS))
    assert everything(sd) == before


@pytest.mark.parametrize("path", ["takeover", "drive"])
def test_the_stand_ins_are_freed_with_the_call(sd: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that kept its states alive would leak latents on every request."""
    made: list[weakref.ref[Any]] = []
    begin = Drive.__init__

    def watched(self: Drive, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Drive, "__init__", watched)
    if path == "drive":
        monkeypatch.setattr(takeover, "why_not", lambda loop: "this test drives it")
    fast = srds_fast.compile(sd, method="srds")
    for _ in range(3):
        latents(fast)
        assert fast.report.path == path
    gc.collect()
    assert len(made) == 3
    assert all(reference() is None for reference in made)


def test_lora_loaded_swapped_scaled_and_unloaded_between_calls() -> None:
    pipe = tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, exact=True, method="srds")
    results = [latents(pipe)]

    def same_as_stock(**call: Any) -> None:
        results.append(latents(pipe, **call))
        assert_close(latents(fast, **call), results[-1])

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


def test_ip_adapter_scale_between_calls(sd: Any) -> None:
    pipe = tiny.stable_diffusion()
    embeds = tiny.add_ip_adapter(pipe)
    fast = srds_fast.compile(pipe, exact=True, method="srds")
    for scale in (1.0, 0.2):
        fast.set_ip_adapter_scale(scale)
        call = {"ip_adapter_image_embeds": embeds}
        assert_close(latents(fast, **call), latents(pipe, **call))


def test_other_pipelines_are_made_from_a_compiled_one() -> None:
    pipe = tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, method="srds")
    image, mask = tiny.image(), tiny.mask()
    variation = StableDiffusionImg2ImgPipeline.from_pipe(fast)
    assert type(variation) is StableDiffusionImg2ImgPipeline
    assert variation.unet is pipe.unet
    auto = AutoPipelineForImage2Image.from_pipe(fast)
    assert type(auto) is StableDiffusionImg2ImgPipeline
    for made in (variation, auto):
        assert_close(
            latents(srds_fast.compile(made, exact=True, method="srds"), image=image), latents(made, image=image)
        )
    inpaint = AutoPipelineForInpainting.from_pipe(fast)
    assert type(inpaint) is StableDiffusionInpaintPipeline
    call = {"image": image, "mask_image": mask}
    assert_close(latents(srds_fast.compile(inpaint, exact=True, method="srds"), **call), latents(inpaint, **call))


def test_switches_act_on_both_and_signatures_are_stocks() -> None:
    for name, (build, _) in tiny.PIPELINES.items():
        pipe = build()
        fast = srds_fast.compile(pipe, method="srds")
        assert inspect.signature(fast.__call__) == inspect.signature(pipe.__call__), name
        assert isinstance(fast, type(pipe))
        assert fast.to(dtype=torch.float64) is fast
        assert next(pipe.components[part] for part in ("unet", "transformer") if part in pipe.components).dtype == (
            torch.float64
        )
        assert repr(fast) == repr(pipe)
    pipe = tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, exact=True, method="srds")
    fast.enable_attention_slicing()
    fast.vae.enable_slicing()
    assert pipe.vae.use_slicing
    assert_close(latents(fast), latents(pipe))


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_every_pipeline_streams_whole_images_of_its_own(name: str) -> None:
    build, call = tiny.PIPELINES[name]
    call = {**call, "num_inference_steps": 14}
    call.pop("output_type")
    pipe = build()
    fast = srds_fast.compile(pipe, max_iterations=2, tolerance=0.0, num_blocks=5, method="srds")
    torch.manual_seed(3)
    seen = list(fast.stream(**call, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(3)
    expected = fast(**call, generator=torch.Generator().manual_seed(0)).images
    assert [refinement.iteration for refinement in seen] == [0, 1, 2]
    for refinement in seen:
        assert len(refinement.images) == len(expected)
    for ours, theirs in zip(seen[-1].images, expected, strict=True):
        assert np.abs(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)).max() <= 1


def test_previews_of_a_half_precision_vae_leave_it_as_it_is() -> None:
    """SDXL's VAE overflows in float16; the stock call casts it to and fro, a preview decodes with a copy."""
    pipe = tiny.stable_diffusion_xl().to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    fast = srds_fast.compile(pipe, max_iterations=1, tolerance=0.0, method="srds")
    call = {"prompt": "a cat", "num_inference_steps": STEPS}
    *_, last = fast.stream(**call, generator=torch.Generator().manual_seed(0))
    preview = last.images[0]
    assert pipe.vae.dtype == torch.float16
    result = fast(**call, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.abs(np.asarray(preview, dtype=float) - np.asarray(result, dtype=float)).max() <= 1


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
    pipe = tiny.stable_diffusion()
    expected = latents(pipe)
    fast = srds_fast.compile(pipe, exact=True, method="srds")
    assert_close(latents(fast), expected)
    assert fast.report.engine_reason is None
    offload(fast)
    for _ in range(2):  # model offloading sets its hooks anew after every call
        assert_close(latents(fast), expected)
        assert "offloaded" in fast.report.engine_reason
        assert "eager because" in str(fast.report)
        assert_close(latents(pipe), expected)


def test_a_call_that_cannot_be_driven_begins_again_from_the_same_random_state() -> None:
    """DiT overwrites its latents with what Euler scales: found out in the first step, after noise has been drawn."""
    pipe = tiny.dit(EulerDiscreteScheduler(**tiny.SD_BETAS, steps_offset=1))
    fast = srds_fast.compile(pipe, method="srds")
    call: dict[str, Any] = {"class_labels": [3], "num_inference_steps": STEPS, "output_type": "pt"}
    states = []
    for each in (pipe, fast):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(0)
        image = each(**call, generator=generator).images
        again = each(**call).images  # noise from the global state
        states.append((torch.as_tensor(image), torch.as_tensor(again), generator.get_state(), torch.get_rng_state()))
    for ours, theirs in zip(*states, strict=True):
        assert torch.equal(ours, theirs)
    assert "overwrites its latents" in fast.report.fallback_reason
    with pytest.raises(UnsupportedPipeline, match="overwrites its latents"):
        list(fast.stream(class_labels=[3], num_inference_steps=STEPS))
    with pytest.raises(UnsupportedPipeline, match="overwrites its latents"):
        srds_fast.compile(pipe, strict=True, method="srds")(**call)


def test_a_list_of_one_generator_draws_for_the_whole_batch_as_stock_does() -> None:
    pipe = tiny.ddpm()
    call: dict[str, Any] = {"batch_size": 3, "num_inference_steps": STEPS, "output_type": "np"}
    expected = pipe(**call, generator=[torch.Generator().manual_seed(0)]).images
    found = srds_fast.compile(pipe, exact=True, method="srds")(
        **call, generator=[torch.Generator().manual_seed(0)]
    ).images
    assert np.abs(found - expected).max() <= 1e-5


def test_an_unread_loop_that_fails_when_driven_runs_as_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the repetition of joined conditioning, rows do not fit it: the stock loop does, or has the same error."""
    pipe = support._pix2pix()
    call = {"image": tiny.image(), "height": 32, "width": 32}
    expected = latents(pipe, **call)
    monkeypatch.setattr(srds_fast.pipelines.lockstep.loop.RowStates, "of", lambda states, drive: states)
    fast = srds_fast.compile(pipe, method="srds")
    assert torch.equal(latents(fast, **call), expected)
    assert "driven, ended in RuntimeError: Sizes of tensors must match" in fast.report.fallback_reason
    with pytest.raises(UnsupportedPipeline, match="Sizes of tensors must match"):
        latents(srds_fast.compile(pipe, strict=True, method="srds"), **call)
    with pytest.raises(ValueError, match="prompt") as found:
        latents(fast, **{**call, "prompt": 3})
    assert not isinstance(found.value, srds_fast.SrdsFastError)


def test_an_unread_loop_whose_time_has_another_unit_is_not_driven(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.flux()
    call = tiny.PIPELINES["flux"][1]
    monkeypatch.delitem(families.FAMILIES, "FluxPipeline")
    fast = srds_fast.compile(pipe, exact=True, method="srds")
    assert_close(latents(fast, **call), latents(pipe, **call))
    assert fast.report.fallback_reason is None
    flux = networks.NETWORKS["FluxTransformer2DModel"]
    monkeypatch.setitem(
        networks.NETWORKS,
        "FluxTransformer2DModel",
        networks.Network(flux.state, flux.per_sample, flux.shared, flux.options),
    )
    assert torch.equal(latents(fast, **call), latents(pipe, **call))
    assert "was expected" in fast.report.fallback_reason


def test_listed_loops_with_a_handling_of_their_own_are_just_those_that_reading_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ways to the same verdict."""
    from srds_fast.pipelines.lockstep.source_check import unknown_in_loop

    refused = set()
    for name, (build, _) in tiny.PIPELINES.items():
        if unknown_in_loop(type(build()).__call__) is not None:
            refused.add(name.removesuffix("_9").removesuffix("_2"))
    assert refused == {
        "stable_diffusion_inpaint",
        "stable_diffusion_xl_inpaint",
        "stable_diffusion_controlnet",
        "stable_diffusion_3",
        "dit",
    }


def test_a_plan_knows_how_many_steps_strength_leaves() -> None:
    build, call = tiny.PIPELINES["stable_diffusion_img2img"]
    pipe = build()
    fast = srds_fast.compile(pipe, tolerance=0.0, method="srds")
    for strength in (0.5, 0.8, 1.0):
        more = {**call, "num_inference_steps": 20, "strength": strength}
        latents(fast, **more)
        assert fast.plan_for(**more).num_inference_steps == fast.report.num_inference_steps == int(20 * strength)
    assert fast.plan_for(**call, num_inference_steps=20, strength=1.0).program().num_waves == fast.report.waves


def test_flow_matching_and_noisy_plans() -> None:
    fast = srds_fast.compile(tiny.stable_diffusion(), method="srds")
    assert fast.plan_for("a", num_inference_steps=30).coarse_solver == "2m"
    assert fast.plan_for("a", num_inference_steps=30, eta=0.5).coarse_solver == "ddim"
    flux = srds_fast.compile(tiny.flux(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)), method="srds")
    assert flux.plan_for("a", num_inference_steps=30).num_blocks > 1


def test_calls_on_the_stock_loop_have_no_plan_and_a_failed_call_no_report(sd: Any) -> None:
    fast = srds_fast.compile(sd, method="srds")
    with pytest.raises(InvalidArgument, match="has no plan: callback was given"):
        fast.plan_for("a", callback=lambda *given: None)
    latents(fast)
    assert fast.report is not None
    with pytest.raises(InvalidArgument):
        latents(fast, num_inference_steps=0)
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


def test_a_class_and_a_scheduler_class_are_refused_with_what_to_pass() -> None:
    with pytest.raises(UnsupportedPipeline, match="StableDiffusionImg2ImgPipeline is a class"):
        srds_fast.compile(StableDiffusionImg2ImgPipeline, method="srds")
    with pytest.raises(InvalidArgument, match="a diffusers scheduler that has been made"):
        srds_fast.sample(lambda x, t: x, torch.zeros(1, 2), DDIMScheduler, 5)


class Together:
    """Runs functions in threads that switch as often as they can, and hands on what they return or raise."""

    def __init__(self, *functions: Callable[[], Any]) -> None:
        self.results: list[Any] = [None] * len(functions)
        self.errors: list[BaseException] = []
        gate = threading.Barrier(len(functions))

        def work(number: int, function: Callable[[], Any]) -> None:
            gate.wait()
            try:
                self.results[number] = function()
            except BaseException as error:
                self.errors.append(error)

        threads = [threading.Thread(target=work, args=each) for each in enumerate(functions)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)


@pytest.mark.parametrize("name", ["stable_diffusion", "flux"])
def test_threads_on_one_compiled_pipe_and_on_the_original_get_what_they_would_get_alone(name: str) -> None:
    build, base = tiny.PIPELINES[name]
    pipe = build(DDIMScheduler(**tiny.SD_NOISE)) if name == "stable_diffusion" else build()
    fast = srds_fast.compile(pipe, exact=True, method="srds")
    calls = [
        {"prompt": "a cat", "num_inference_steps": 9},
        {"prompt": "a rather longer prompt about a dog", "num_inference_steps": 14},
        {"prompt": "ships", "num_inference_steps": 11},
    ]
    if name == "stable_diffusion":
        calls[1] |= {"guidance_scale": 1.0, "height": 24, "width": 40}

    def job(each: Any, number: int) -> Callable[[], Any]:
        def run() -> Any:
            results = [latents(each, number, **{**base, **calls[number]}) for _ in range(6)]
            return results, fast.report

        return run

    # the original is called in one thread only: two stock calls at once do get into each other's way
    jobs = [(fast, 0), (fast, 1), (pipe, 2)]
    alone = [job(*each)()[0][0] for each in jobs]
    together = Together(*(job(*each) for each in jobs))
    assert together.errors == []
    for expected, (found, _) in zip(alone, together.results, strict=True):
        for result in found:
            assert torch.equal(result, expected)
    assert [report and report.num_inference_steps for _, report in together.results] == [9, 14, None]


def test_threads_do_not_get_each_others_padding() -> None:
    """What a call on the original does to its tokenizer, over and over, beside calls on the compiled pipe."""
    pipe = tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, method="sequential")
    call = {"prompt": ["a cat", "dogs", "a rather longer one"] * 8, "num_inference_steps": 1, "height": 8, "width": 8}
    expected = latents(fast, **call)
    stop = threading.Event()

    def tokenize() -> None:
        while not stop.is_set():
            pipe.tokenizer("a cat", padding="longest", return_tensors="pt")
            pipe.tokenizer("a cat", padding="max_length", max_length=40, truncation=True, return_tensors="pt")

    def sample() -> list[Tensor]:
        try:
            return [latents(fast, **call) for _ in range(40)]
        finally:
            stop.set()

    together = Together(sample, tokenize)
    assert together.errors == []
    assert all(torch.equal(found, expected) for found in together.results[0])


def test_threads_that_scale_a_lora_wait_for_each_other() -> None:
    pipe = tiny.stable_diffusion()
    tiny.add_lora(pipe.unet)
    fast = srds_fast.compile(pipe, exact=True, method="srds")

    def job(scale: float) -> Callable[[], Any]:
        return lambda: [latents(fast, cross_attention_kwargs={"scale": scale}) for _ in range(3)]

    alone = [job(scale)()[0] for scale in (0.3, 0.8)]
    together = Together(job(0.3), job(0.8))
    assert together.errors == []
    for expected, found in zip(alone, together.results, strict=True):
        assert all(torch.equal(result, expected) for result in found)


def test_tokenizers_are_copied_once_and_again_when_tokens_are_added(sd: Any) -> None:
    pipe = tiny.stable_diffusion()
    spares = Spares()
    with spares.lent(pipe) as first, spares.lent(pipe) as second:
        assert first["tokenizer"] is not second["tokenizer"]
        assert first["tokenizer"] is not pipe.tokenizer
        assert first["tokenizer"]("cat").input_ids == pipe.tokenizer("cat").input_ids
    kept = {id(first["tokenizer"]), id(second["tokenizer"])}
    with spares.lent(pipe) as again:
        assert id(again["tokenizer"]) in kept
    pipe.tokenizer.add_tokens(["<thing>"])
    with spares.lent(pipe) as renewed:
        assert id(renewed["tokenizer"]) not in kept
        assert "<thing>" in renewed["tokenizer"].get_vocab()
