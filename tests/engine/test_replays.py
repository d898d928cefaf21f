"""A replay gives what the eager engine gives, whatever the call and the network, and nothing stale is replayed."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import tiny
import torch
from support import SCHEDULERS
from torch import Tensor, nn
from twins import Twins, differ, put

EXACT: dict[str, Any] = {"method": "srds", "num_blocks": 3, "exact": True}
SRDS: dict[str, Any] = {"method": "srds", "num_blocks": 3}
SEQUENTIAL: dict[str, Any] = {"method": "sequential"}
TRUE_GUIDANCE = {"true_cfg_scale": 3.0, "negative_prompt": "dog"}

# pipeline, settings, call
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "SD, srds": ("stable_diffusion", SRDS, {"guidance_scale": 5.0}),
    "SD, unguided, sequential": ("stable_diffusion", SEQUENTIAL, {"guidance_scale": 1.0}),
    "SD, 16 x 32, exact": ("stable_diffusion", EXACT, {"guidance_scale": 5.0, "height": 16}),
    "SDXL": ("stable_diffusion_xl", EXACT, {}),
    "SD3": ("stable_diffusion_3", EXACT, {}),
    "Flux": ("flux", EXACT, {}),
    "Flux, embedded guidance": ("flux_guidance", EXACT, {}),
    "Flux, true guidance": ("flux", EXACT, TRUE_GUIDANCE),
    "PixArt": ("pixart", EXACT, {}),
    "DiT": ("dit", EXACT, {}),
    "DDIM": ("ddim", EXACT, {}),
    "DDPM": ("ddpm", EXACT, {}),
    "image to image": ("stable_diffusion_img2img", EXACT, {"num_inference_steps": 4}),
}


@functools.cache
def untouched(name: str) -> Any:
    """A pipe for tests that do not change it."""
    return tiny.PIPELINES[name][0]()


@pytest.fixture
def flux() -> Twins:
    return Twins()


@pytest.fixture
def sd() -> Twins:
    """With two steps: a UNet takes long to record."""
    twins = Twins("stable_diffusion", method="sequential")
    twins.base["num_inference_steps"] = 2
    return twins


@pytest.mark.parametrize("name", CASES)
def test_replay_equals_eager(name: str) -> None:
    """Of other seeds and, where there are any, other prompts."""
    pipeline, settings, call = CASES[name]
    twins = Twins(pipeline, untouched(pipeline), **settings)
    results = [twins.first(**call)]
    for seed, prompt in enumerate(["a dog in the snow", ""], start=1):
        results.append(twins.replayed(seed, **call, **({"prompt": prompt} if "prompt" in twins.base else {})))
    assert differ(*results)
    assert twins.counts == (1, 2)


FEW = ("Euler ancestral", "DPM-Solver++ (1, 2)")


@pytest.mark.parametrize(
    "scheduler",
    [
        name if name in FEW else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in SCHEDULERS
        if "flow" not in name
    ],
)
def test_replay_equals_eager_with_every_scheduler(scheduler: str) -> None:
    twins = Twins("stable_diffusion", tiny.stable_diffusion(SCHEDULERS[scheduler]()))
    assert differ(twins.first(), twins.replayed(1, prompt="a dog"))


@pytest.mark.parametrize("batch", [{"prompt": ["a", "b c"]}, {"num_images_per_prompt": 2}], ids=["prompts", "images"])
def test_samples_that_finish_apart(batch: dict[str, Any]) -> None:
    """Eager narrows its batch as samples finish, and rounds otherwise; a replay keeps it as wide as it was."""
    twins = Twins(method="srds", tolerance=1e-3, num_blocks=5)
    twins.base["num_inference_steps"] = 10

    def call(seed: int) -> dict[str, Any]:
        latents = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(seed))
        latents[1] *= 0.1
        return {**batch, "latents": latents}

    twins.first(**call(0), relative=1e-5)
    for seed in (1, 2):
        assert len(twins.replayed(**call(seed), relative=1e-5)) == 2
        report, expected = twins.report, twins.eager.report
        assert len(set(report.iterations_per_sample)) == 2, "this test needs samples that finish apart"
        assert report.iterations_per_sample == expected.iterations_per_sample
        assert report.converged == expected.converged
        assert report.evaluations >= expected.evaluations
        for ours, theirs in zip(report.change, expected.change, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert (one is None) == (other is None)
                assert one is None or one == pytest.approx(other, rel=1e-3, abs=1e-7)


# what is another recording, and what is not


KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "batch size": ("flux", {}, {"prompt": ["a cat", "a dog"], "relative": 1e-5}),
    "guidance off": ("stable_diffusion", {"guidance_scale": 5.0}, {"guidance_scale": 1.0}),
    "number of steps": ("flux", {}, {"num_inference_steps": 8}),
}


@pytest.mark.parametrize("name", KINDS)
def test_another_kind_of_call_is_another_recording_and_going_back_is_not(name: str) -> None:
    pipeline, one, other = KINDS[name]
    twins = Twins(pipeline, untouched(pipeline), method="sequential")
    results = twins.first(**one), twins.first(**other)
    assert differ(*results)
    assert torch.equal(twins.replayed(**one), results[0])
    assert torch.equal(twins.replayed(**other), results[1])
    assert twins.counts == (2, 2)


def latents(seed: int) -> Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


SMALL = {"height": 16, "width": 16}
INPUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "strength of guidance": ("stable_diffusion", {"guidance_scale": 5.0}, {"guidance_scale": 3.0}),
    "latents": ("stable_diffusion", {"latents": latents(0)}, {"latents": latents(1)}),
    "class": ("dit", {"class_labels": [1]}, {"class_labels": [7]}),
    "scale of a ControlNet": (
        "stable_diffusion_controlnet",
        {**SMALL, "controlnet_conditioning_scale": 0.3},
        {**SMALL, "controlnet_conditioning_scale": 1.2},
    ),
    "scales of two ControlNets": (
        "stable_diffusion_controlnet_2",
        {**SMALL, "controlnet_conditioning_scale": [0.3, 0.7]},
        {**SMALL, "controlnet_conditioning_scale": [1.0, 0.2]},
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_another_input_needs_no_other_recording(name: str) -> None:
    pipeline, one, other = INPUTS[name]
    twins = Twins(pipeline, untouched(pipeline), method="sequential")
    twins.base["num_inference_steps"] = 2
    first = twins.first(**one)
    assert differ(first, twins.replayed(**other))
    assert torch.equal(twins.replayed(**one), first)


def test_another_scheduler_is_another_recording(sd: Twins) -> None:
    sd.base["num_inference_steps"] = 3
    kept, other = sd.pipe.scheduler, SCHEDULERS["Euler"]()
    results = [sd.first()]
    sd.pipe.scheduler = other
    results.append(sd.first())
    sd.pipe.scheduler = kept
    sd.replayed()
    sd.pipe.scheduler = type(other).from_config(other.config, use_karras_sigmas=True)
    results.append(sd.first())
    assert differ(*results)


# LoRA


def test_adapters_switched_to_and_fro_are_recorded_once_each(flux: Twins) -> None:
    plain = flux.first()
    network = flux.network
    for seed, name in enumerate(["first", "second"]):
        tiny.add_lora(network, name, seed)
    results = {"second": flux.first()}
    network.set_adapter("first")
    results["first"] = flux.first()
    for name in ("second", "first"):
        network.set_adapter(name)
        assert torch.equal(flux.replayed(), results[name])
    mixed = []
    for weights in ([0.4, 0.7], [0.7, 0.4], [0.4, 0.7]):
        network.set_adapters(["first", "second"], weights)
        mixed.append(flux.same())
    assert torch.equal(mixed[0], mixed[2])
    assert differ(plain, *results.values(), *mixed[:2])
    network.disable_lora()
    assert torch.allclose(flux.same(), plain, atol=1e-6)


def test_a_lora_scaled_in_the_call_needs_no_other_recording(flux: Twins) -> None:
    tiny.add_lora(flux.network)
    found = [flux.first(joint_attention_kwargs={"scale": 0.3})]
    found += [flux.replayed(joint_attention_kwargs={"scale": scale}) for scale in (1.5, 0.0)]
    assert torch.equal(flux.replayed(joint_attention_kwargs={"scale": 0.3}), found[0])
    assert differ(*found)
    scaling = [layer.scaling for layer in flux.network.modules() if hasattr(layer, "scale_layer")]
    assert all(isinstance(number, float) for numbers in scaling for number in numbers.values()), "numbers are put back"
    assert differ(flux.same(), *found)


# everything else that changes a network between calls


def test_weights_written_in_place_are_seen_by_a_replay_and_others_are_recorded(flux: Twins) -> None:
    layer = flux.network.proj_out
    results = [flux.first()]
    with torch.no_grad():
        layer.weight.mul_(2)
    results.append(flux.replayed())
    with torch.no_grad():
        layer.weight.mul_(0.5)
    assert torch.equal(flux.replayed(), results[0])
    assert flux.counts == (1, 2)
    layer.weight.data = layer.weight.data * 3
    results.append(flux.first())
    layer.weight = nn.Parameter(layer.weight.detach() * 2)
    results.append(flux.first())
    flux.network.proj_out = nn.Linear(layer.in_features, layer.out_features).eval()
    results.append(flux.first())
    flux.network.proj_out = layer
    assert torch.equal(flux.replayed(), results[3])
    assert differ(*results)


def test_a_weight_moved_away_and_back(flux: Twins) -> None:
    """Its memory may be that of another by then; what lies where it lay must not be taken for it."""
    layer = flux.network.proj_out
    own = layer.weight.data
    before = flux.first()
    for factor in (2.0, 3.0, 4.0):
        layer.weight.data = own * factor
        assert differ(flux.same(), before)
        gc.collect()
    layer.weight.data = own
    assert torch.equal(flux.same(), before)


def test_functions_and_modules_one_after_another_in_the_same_place(flux: Twins) -> None:
    layer, results = put(flux), {}
    for factor in (2.0, 3.0, 4.0):
        layer.act = lambda y, factor=factor: y * factor
        results[factor] = flux.same()
    assert differ(*results.values())
    results = {}
    for kind in 2 * (nn.Sigmoid, nn.Tanh, nn.SiLU):
        layer.act = kind()
        found = flux.same()
        assert torch.equal(results.setdefault(kind, found), found)
    assert differ(*results.values())
    layer.act.__class__ = nn.Tanh
    assert torch.equal(flux.same(), results[nn.Tanh])


# the state of the process


def test_autocast_on_and_off(flux: Twins) -> None:
    full = flux.first()
    half = []
    for seed in (0, 0, 1):
        with torch.autocast("cpu", torch.bfloat16):
            half.append(flux.same(seed))
    assert torch.equal(flux.replayed(), full)
    assert torch.equal(half[0], half[1])
    assert differ(full, *half[1:])


def test_a_call_that_records_more_leaves_autocasts_cache_as_it_was() -> None:
    """Weights are cast once in a context, and kept: none may be kept that a recording made."""
    twins = Twins(tolerance=1e-4, num_blocks=4)
    twins.base["num_inference_steps"] = 8
    for factor, seeds in ((1e-4, [0]), (1e4, range(3))):
        twins.network.requires_grad_(factor > 1)
        with torch.no_grad():
            twins.network.proj_out.weight.mul_(factor)
        with torch.autocast("cpu", torch.bfloat16):
            for seed in seeds:
                twins.same(seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_another_dtype(dtype: torch.dtype, flux: Twins) -> None:
    before = flux.first()
    flux.pipe.to(dtype)
    half = flux.first()
    assert half.dtype == dtype
    assert torch.equal(flux.replayed(), half)
    if dtype == torch.float64:
        flux.pipe.to(torch.float32)
        assert torch.equal(flux.same(), before)


def test_inference_mode_around_the_call(flux: Twins) -> None:
    before = flux.first()
    with torch.inference_mode():
        assert torch.equal(flux.same(), before)
        assert torch.equal(flux.same(), before)
    assert torch.equal(flux.replayed(), before)


@pytest.mark.parametrize("interface", ["old", "new"])
def test_float32_precision_is_part_of_the_kind_in_either_interface(interface: str, flux: Twins) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    flux.first(0)
    try:
        if interface == "old":
            torch.set_float32_matmul_precision("high")
        else:
            matmul.fp32_precision = "tf32"
        flux.first(1)
        flux.replayed(2)
    finally:
        if interface == "old":
            torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
    flux.replayed(3)


def test_the_attention_of_the_process_is_part_of_the_kind(flux: Twins) -> None:
    """What `model.set_attention_backend` leaves behind for every other model."""
    from diffusers.models.attention_dispatch import attention_backend

    flux.first(0)
    with attention_backend("_native_math"):
        flux.first(1)
    flux.replayed(3)
