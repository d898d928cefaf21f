"""Modular pipelines: the families of diffusers run in parallel and exactly; guiders, blocks of the user, previews."""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any

import diffusers
import modulars
import numpy as np
import pytest
import torch
from calls import assert_close
from diffusers.modular_pipelines import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from torch import Tensor

import srds_fast
from srds_fast import InvalidArgument, UnknownArgument, UnsupportedPipeline

STEPS, MANY = 4, 50
EXACT: dict[str, Any] = {"method": "srds", "exact": True}


def made(pipe: Any, steps: int = STEPS, seed: int = 0, **call: Any) -> Tensor:
    """The latents of a call with a fresh generator."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensor = pipe(**{"num_inference_steps": steps, "generator": generator, "output": "latents", **call})
    return found


def pipeline(name: str, steps: int) -> tuple[Any, dict[str, Any]]:
    """A pipeline and the arguments of a call."""
    build, call = modulars.PIPELINES[name]
    if name == "ideogram 4":  # one number for each step
        call = {**call, "guidance_schedule": [7.0] * (steps - 3) + [3.0] * 3}
    return build(), call


# in every run; the others come with `pytest -m exhaustive`
SOME = ("sdxl, masked", "flux, from an image", "wan", "wan 2.2", "qwen-image", "z-image", "sd3", "flux 2 klein base")


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.exhaustive) for name in modulars.PIPELINES]
)
def test_every_family_is_exact(name: str) -> None:
    pipe, call = pipeline(name, STEPS)
    fast = srds_fast.compile(pipe, **EXACT, strict=True)
    assert_close(made(fast, **call), made(pipe, **call))
    assert fast.report.path in ("takeover", "drive")


@pytest.fixture(scope="module")
def flux() -> Any:
    return modulars.flux()


@pytest.fixture(scope="module")
def wan() -> Any:
    return modulars.wan()


FLUX, WAN = (modulars.PIPELINES[name][1] for name in ("flux", "wan"))


@pytest.mark.parametrize("name", ["flux", "z-image"])
def test_fifty_steps_take_fewer_waves(name: str) -> None:
    pipe, call = pipeline(name, MANY)
    fast = srds_fast.compile(pipe, method="srds", strict=True)
    found, expected = made(fast, MANY, **call), made(pipe, MANY, **call)
    assert fast.report.waves < MANY
    assert float((found - expected).abs().mean()) <= 4e-3


@pytest.mark.parametrize("name", ["flux", "z-image"])
def test_one_step_after_another_gives_the_same_bits(name: str) -> None:
    """Taken over without guidance, and by turns of the loop."""
    pipe, call = pipeline(name, STEPS)
    assert torch.equal(made(srds_fast.compile(pipe, method="sequential"), **call), made(pipe, **call))


# guiders
GUIDERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "none": (diffusers.ClassifierFreeGuidance, {"guidance_scale": 1.0}),
    "in an interval": (diffusers.ClassifierFreeGuidance, {"guidance_scale": 4.0, "start": 0.3, "stop": 0.8}),
    "rescaled": (diffusers.ClassifierFreeGuidance, {"guidance_scale": 4.0, "guidance_rescale": 0.7}),
    "projected": (diffusers.AdaptiveProjectedGuidance, {"guidance_scale": 4.0}),
    "zero star": (diffusers.ClassifierFreeZeroStarGuidance, {"guidance_scale": 4.0}),
    "tangential": (diffusers.TangentialClassifierFreeGuidance, {"guidance_scale": 4.0}),
}
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "momentum": (
        diffusers.AdaptiveProjectedGuidance,
        {"adaptive_projected_guidance_momentum": -0.5},
        "such as momentum",
    ),
    "hooks": (
        diffusers.SkipLayerGuidance,
        {"skip_layer_config": diffusers.LayerSkipConfig(indices=[1], fqn="blocks"), "skip_layer_guidance_stop": 1.0},
        "changes the WanTransformer3DModel around single calls, by hooks",
    ),
}


def guided(pipe: Any, guider: Any) -> Any:
    """A pipeline of the same parts with another guider."""
    other = copy.copy(pipe)
    other.guider = guider
    return other


@pytest.mark.parametrize("name", GUIDERS)
def test_guiders_whose_guidance_depends_on_the_step_alone_are_exact(wan: Any, name: str) -> None:
    cls, options = GUIDERS[name]
    pipe = guided(wan, cls(**options))
    fast = srds_fast.compile(pipe, **EXACT, strict=True)
    before = vars(pipe.guider).copy()
    found = made(fast, **WAN)
    assert vars(pipe.guider) == before
    assert_close(found, made(pipe, **WAN))


@pytest.mark.parametrize("name", REFUSED)
def test_other_guiders_run_on_the_stock_loop_with_the_reason(
    wan: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    cls, options, why = REFUSED[name]
    pipe = guided(wan, cls(**options))
    fast = srds_fast.compile(pipe, **EXACT)
    expected = made(pipe, **WAN)
    for _ in range(2):  # what is known of the first call is used in the second
        assert torch.equal(made(fast, **WAN), expected)
        assert why in fast.report.fallback_reason
    assert len(fast._srds.loops.facts) == 1
    # diffusers logs every exception that passes through a block
    assert not any(each.levelno >= logging.ERROR for each in caplog.records)
    with pytest.raises(UnsupportedPipeline, match=why):
        made(srds_fast.compile(pipe, **EXACT, strict=True), **WAN)


def test_a_cache_of_the_loop_runs_on_the_stock_loop() -> None:
    pipe, call = pipeline("qwen-image 2.1", STEPS)
    call = {name: value for name, value in call.items() if name != "use_kv_cache"}  # it is the default
    fast = srds_fast.compile(pipe, **EXACT)
    assert torch.equal(made(fast, **call), made(pipe, **call))
    assert "pass use_kv_cache=False" in fast.report.fallback_reason


# blocks of the user


class Block(ModularPipelineBlocks):
    """A block of a loop that changes the output of the network."""

    def __init__(self, factor: float = 0.9) -> None:
        super().__init__()
        self.factor = factor

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("noise_pred")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("noise_pred")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any, i: int, t: Tensor) -> Any:
        state.noise_pred = self.change(state.noise_pred, i)
        return components, state

    def change(self, m: Tensor, i: int) -> Tensor:
        return m * self.factor * (1 + 0.1 * i)


class Momentum(Block):
    _average: Tensor | None = None

    def change(self, m: Tensor, i: int) -> Tensor:
        self._average = m if i == 0 or self._average is None else 0.5 * (self._average + m)
        return self._average


class KeepsAList(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def change(self, m: Tensor, i: int) -> Tensor:
        self.seen.append(m)
        return m + 0.01 * len(self.seen)


class Random(Block):
    def change(self, m: Tensor, i: int) -> Tensor:
        return m + 0.1 * torch.randn(m.shape)


def with_block(block: Any) -> Any:
    """Flux with a further block in its loop."""
    pipe = modulars.flux()
    loop = pipe._blocks.sub_blocks["denoise"].sub_blocks["denoise"]
    loop.sub_blocks.insert("own", block, len(loop.sub_blocks) - 1)
    return pipe


def test_a_block_of_the_user_in_the_loop_is_exact() -> None:
    pipe = with_block(block := Block())
    fast = srds_fast.compile(pipe, **EXACT, strict=True)
    first = made(fast, **FLUX)
    assert_close(first, made(pipe, **FLUX))
    block.factor = 0.5  # another kind of call
    assert_close(found := made(fast, **FLUX), made(pipe, **FLUX))
    assert not torch.equal(found, first)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Momentum, "such as momentum or a counter"),
        (KeepsAList, "such as momentum or a counter"),
        (Random, "draws random numbers"),
    ],
)
def test_a_block_that_keeps_or_draws_something_runs_on_the_stock_loop(cls: Any, why: str) -> None:
    block = cls()
    pipe = with_block(block)
    fast = srds_fast.compile(pipe, **EXACT)
    torch.manual_seed(0)
    found = made(fast, **FLUX)
    assert why in fast.report.fallback_reason
    assert fast.report.num_inference_steps == STEPS
    if cls is KeepsAList:
        assert len(block.seen) == STEPS  # of the stock loop alone
        block.seen.clear()
    torch.manual_seed(0)
    assert torch.equal(found, made(pipe, **FLUX))


# a drop-in


def test_outputs_are_those_of_the_pipeline(flux: Any) -> None:
    fast = srds_fast.compile(flux, **EXACT)
    call = {**FLUX, "output_type": "pt"}
    state, expected = made(fast, **call, output=None), made(flux, **call, output=None)
    assert state.values.keys() == expected.values.keys()
    for name, value in expected.values.items():
        assert type(state.values[name]) is type(value), name
    assert torch.equal(state.timesteps, expected.timesteps)
    named = made(fast, **call, output=["images", "timesteps", "latents"])
    assert {name: type(value) for name, value in named.items()} == dict.fromkeys(named, Tensor)
    given = PipelineState(values={**call, "num_inference_steps": STEPS})  # instead of arguments
    again: Tensor = fast(given, "latents", generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, state.latents)


def test_pipelines_of_single_steps_pass_their_states_on(flux: Any) -> None:
    """Text, loop and decoder as pipelines of their own, the way that nodes of a graph use them."""
    blocks = diffusers.FluxAutoBlocks()
    text = modulars.ready(blocks.sub_blocks.pop("text_encoder"), flux.components, ())
    loop = modulars.ready(blocks, flux.components, ("decode", "vae_encoder"))
    state = text(prompt=FLUX["prompt"], max_sequence_length=16)
    fast = srds_fast.compile(loop, **EXACT, strict=True)
    size = {"height": 16, "width": 16, "num_inference_steps": STEPS}
    generator = torch.Generator()
    found = fast(state, "latents", generator=generator.manual_seed(0), **size)
    assert_close(found, loop(state, "latents", generator=generator.manual_seed(0), **size))
    *_, last = fast.stream(state, generator=generator.manual_seed(0), **size)
    with pytest.raises(UnsupportedPipeline, match="No block of FluxModularPipeline decodes"):
        assert last.images
    only = loop._blocks.sub_blocks["denoise"].sub_blocks["denoise"]
    inner = srds_fast.compile(modulars.ready(only, flux.components, ()), **EXACT)
    flux.scheduler.set_timesteps(STEPS, mu=1.0)
    inputs = {"latents": torch.zeros(1, 16, 4), "timesteps": flux.scheduler.timesteps, "num_inference_steps": STEPS}
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(16, 3), "guidance": torch.ones(1)}
    inner(**state.get_by_kwargs("denoiser_input_fields"), **inputs, **ids)
    assert "outside of one loop over the timesteps" in inner.report.fallback_reason
    assert inner.report.num_inference_steps == STEPS


def test_plans_and_errors(flux: Any) -> None:
    fast = srds_fast.compile(flux, method="srds")
    assert fast.original is flux
    assert fast.plan_for(**FLUX, num_inference_steps=20).num_inference_steps == 20
    assert fast.plan_for(**FLUX).num_inference_steps == MANY  # the default of its blocks
    part = {**FLUX_IMAGE, "num_inference_steps": 20, "strength": 0.5}
    assert fast.plan_for(**part).num_inference_steps == 10
    with pytest.raises(InvalidArgument, match="num_inference_steps"):
        made(fast, 0, **FLUX)
    with pytest.raises(UnsupportedPipeline, match="no diffusers pipeline with a scheduler"):
        srds_fast.compile(flux._blocks)
    with pytest.raises(UnknownArgument, match="takes no argument callback_on_step_end"):
        made(fast, **FLUX, callback_on_step_end=lambda *given: {})


FLUX_IMAGE = modulars.PIPELINES["flux, from an image"][1]


def test_an_error_of_a_block_is_raised_and_logged(flux: Any, caplog: pytest.LogCaptureFixture) -> None:
    fast = srds_fast.compile(flux, method="srds")
    with pytest.raises(ValueError, match="prompt"):
        made(fast, **{**FLUX, "prompt": 3})
    assert "Error in block" in caplog.text


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_previews_are_decoded_by_the_blocks_behind_the_loop(name: str) -> None:
    pipe, call = pipeline(name, STEPS)
    fast, output = srds_fast.compile(pipe, **EXACT), "videos" if name == "wan" else "images"
    generator, decoded = torch.Generator().manual_seed(0), []
    handle = pipe.vae.decoder.register_forward_hook(lambda *given: decoded.append(1))
    *_, last = fast.stream(**call, num_inference_steps=STEPS, generator=generator)
    assert fast.plan_for(**call, num_inference_steps=STEPS, measure=True).num_inference_steps == STEPS
    handle.remove()
    assert not decoded  # but when images are asked for
    expected = made(pipe, **call, output=output, output_type="pil")
    (found,), (expected,) = (last.images, expected)
    if name == "flux":
        found, expected = [found], [expected]
    for one, other in zip(found, expected, strict=True):
        assert int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max()) <= 1
    assert fast.report.path == "takeover"


def test_an_interrupt_ends_the_call(flux: Any) -> None:
    fast = srds_fast.compile(flux, **EXACT, strict=True)
    made(fast, **FLUX)  # no later call rehearses
    waves = fast.report.waves
    handle = flux.transformer.register_forward_hook(lambda *given: setattr(fast, "_interrupt", True))
    found = made(fast, **FLUX)
    handle.remove()
    assert fast.report.interrupted
    assert fast.report.waves < waves
    assert bool(found.isfinite().all())
    made(fast, **FLUX)
    assert not fast.report.interrupted


def test_warm_start_and_copies(flux: Any) -> None:
    fast = copy.deepcopy(srds_fast.compile(flux, method="parataa"))
    assert fast.transformer is not flux.transformer
    found = made(fast, **FLUX, keep_trajectory=True)
    trajectory, waves = fast.trajectory, fast.report.waves
    assert trajectory.shape[0] == STEPS + 1
    made(fast, **FLUX, warm_start=trajectory)
    assert fast.report.waves < waves
    assert float((found - made(flux, **FLUX)).abs().mean()) <= 4e-3


def test_threads_do_not_disturb_each_other(wan: Any) -> None:
    """A guider holds the step of a loop: calls must not share it."""
    pipe = guided(wan, diffusers.ClassifierFreeGuidance(guidance_scale=4.0, start=0.3, stop=0.8))
    fast = srds_fast.compile(pipe, **EXACT, strict=True)
    expected = [made(fast, seed=seed, **WAN) for seed in range(3)]
    found: dict[int, Tensor] = {}

    def call(seed: int) -> None:
        found[seed] = made(fast, seed=seed, **WAN)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, latents in enumerate(expected):
        assert torch.equal(found[seed], latents)


def test_auto_looks_again_if_the_guider_is_another_one(wan: Any) -> None:
    pipe = guided(wan, diffusers.ClassifierFreeGuidance(guidance_scale=4.0))
    fast = srds_fast.compile(pipe)
    expected = made(pipe, **WAN)
    for _ in range(4):
        assert_close(made(fast, **WAN), expected, relative=1e-2)
    assert fast.report.plan_state != "exploring"
    fast.guider = diffusers.ClassifierFreeGuidance(guidance_scale=1.0)
    made(fast, **WAN)
    assert fast.report.plan_state == "exploring"
