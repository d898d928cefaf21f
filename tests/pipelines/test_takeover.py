"""Taking a loop over: what one recorded turn tells of its guidance, and that nothing is lost where it tells little."""

from __future__ import annotations

from typing import Any

import calls
import numpy
import pytest
import tiny
import torch
from calls import assert_close, denoiser, drive, instances, look, of_waves, watched
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

import srds_fast
from srds_fast.engine.merging.rule import Call
from srds_fast.pipelines.takeover.calls import arguments_of
from srds_fast.pipelines.takeover.inferred import Inference
from srds_fast.sampling.recorded.network import RecordedNetwork
from srds_fast.sampling.rows import TiledConditioning

# pipeline, arguments, the weights that its guidance means, in the order of its branches
GUIDANCE: dict[str, tuple[str, dict[str, Any], list[float]]] = {
    "two branches": ("stable_diffusion", {"guidance_scale": 5.0}, [-4.0, 5.0]),
    "none": ("stable_diffusion", {"guidance_scale": 1.0}, [1.0]),
    "two images": ("stable_diffusion", {"guidance_scale": 2.5, "num_images_per_prompt": 2}, [-1.5, 2.5]),
    "SDXL": ("stable_diffusion_xl", {"guidance_scale": 3.0}, [-2.0, 3.0]),
    "SD3": ("stable_diffusion_3", {"guidance_scale": 4.0}, [-3.0, 4.0]),
    "Flux": ("flux", {}, [1.0]),
    # the second call is the negative prompt's
    "Flux, true guidance": ("flux", {"true_cfg_scale": 3.0, "negative_prompt": "dog"}, [3.0, -2.0]),
    "learned variance": ("pixart", {"guidance_scale": 4.5}, [-3.5, 4.5]),
    # the conditional branch comes first
    "DiT": ("dit", {"guidance_scale": 4.0}, [4.0, -3.0]),
    "pixels": ("ddim", {}, [1.0]),
    "ControlNet": ("stable_diffusion_controlnet", {"guidance_scale": 5.0}, [-4.0, 5.0]),
    "several ControlNets": ("stable_diffusion_controlnet_2", {"guidance_scale": 3.0}, [-2.0, 3.0]),
}


def run(pipe: Any, call: dict[str, Any], **changed: Any) -> Tensor:
    return calls.latents(pipe, **{**call, **changed})


@pytest.mark.parametrize("name", GUIDANCE)
def test_the_weights_of_the_branches_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to driving the loop."""
    pipeline, arguments, weights = GUIDANCE[name]
    build, call = tiny.PIPELINES[pipeline]
    pipe = build()
    fast = srds_fast.compile(pipe, exact=True, method="srds")
    made = instances(monkeypatch, RecordedNetwork)
    before = torch.get_rng_state()
    with watched(denoiser(pipe)) as seen:
        found = run(fast, call | arguments)
    assert torch.equal(torch.get_rng_state(), before), "probes have a generator of their own"
    assert fast.report.path == "takeover"
    assert fast.report.drive_reason is None
    torch.testing.assert_close(made[0].inferred.guidance, torch.tensor(weights).double(), rtol=1e-7, atol=1e-7)
    per_wave = sum(call.pattern.output is not None for call in made[0].calls)
    others = len(made[0].calls) - per_wave
    assert len(of_waves(seen, fast.report, per_wave, others)) == fast.report.waves * per_wave

    drive(monkeypatch)
    fast.reset()
    run(fast, call | arguments)  # finds out how the loop runs
    driven = run(fast, call | arguments)
    assert fast.report.path == "drive"
    assert "(drive), because this test drives it" in str(fast.report)
    assert_close(found, driven, 2e-6)


@pytest.mark.parametrize(
    ("pipeline", "more", "why"),
    [
        ("stable_diffusion", {"guidance_rescale": 0.7}, "not one weighted sum"),
        ("stable_diffusion_controlnet", {"guess_mode": True}, "depends on more than the step"),
    ],
)
def test_what_is_not_taken_over_says_why(pipeline: str, more: dict[str, Any], why: str) -> None:
    build, call = tiny.PIPELINES[pipeline]
    fast = srds_fast.compile(build(), exact=True, method="srds")
    run(fast, call, num_inference_steps=4, **more)
    assert fast.report.path == "drive"
    assert why in fast.report.drive_reason


@pytest.mark.parametrize("settings", [{"in_flight": 1}, {"max_rows": 2}])
def test_a_controlnet_may_take_more_waves_than_steps(settings: dict[str, Any]) -> None:
    """Its loop looks up by step what to keep of the ControlNet."""
    build, call = tiny.PIPELINES["stable_diffusion_controlnet"]
    pipe = build()
    fast = srds_fast.compile(pipe, method="srds", tolerance=0.0, **settings)
    found = run(fast, call)
    assert fast.report.path == "takeover"
    assert fast.report.in_flight == settings.get("in_flight")
    assert_close(found, run(pipe, call))
    assert_close(run(fast, call, callback_on_step_end=look), found)
    assert fast.report.path == "takeover"


@pytest.mark.parametrize("method", ["auto", "srds", "sequential"])
def test_a_single_step_that_is_asked_for_x0(method: str) -> None:
    """PixArt takes the predicted x0 as its sample where there is one step."""
    _, call = tiny.PIPELINES["pixart"]
    pipe = tiny.pixart(DDIMScheduler())
    fast = srds_fast.compile(pipe, method=method)
    assert_close(*(run(each, call, num_inference_steps=1) for each in (fast, pipe)))
    assert fast.report.drive_reason == "it has a single step"
    assert fast.report.rehearsal_calls == fast.report.check_calls == 0


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_an_interrupted_sequential_run_gives_the_state_where_it_stands(scheduler: Any) -> None:
    """Not what the network was given of it: scaled, and once per branch."""
    pipe = tiny.stable_diffusion(scheduler(**tiny.SD_BETAS, steps_offset=1))
    stock: list[Tensor] = []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        stock.append(tensors["latents"])
        return tensors

    call = {"prompt": "a cat", "height": 32, "width": 32, "output_type": "latent"}
    run(pipe, call, callback_on_step_end=note)
    fast = srds_fast.compile(pipe, method="sequential")
    run(fast, call)
    with watched(pipe.unet, lambda states: setattr(fast, "_interrupt", len(seen) == 5)) as seen:
        found = run(fast, call)
    assert fast.report.path == "takeover"
    assert fast.report.interrupted
    assert len(seen) == 5
    # the step under way is completed, as in the stock loop
    assert_close(found, stock[4])


def test_options_are_kept_as_they_were_when_the_call_was_made() -> None:
    """Flux puts other image embeddings into the same dictionary before the call of its negative prompt."""
    options = {"ip_adapter_image_embeds": [torch.ones(1)]}
    first = Call(torch.nn.ReLU(), (), {"joint_attention_kwargs": options})
    assert first.kind is not None
    options["ip_adapter_image_embeds"] = [torch.full((1,), 2.0)]
    second = Call(torch.nn.ReLU(), (), {"joint_attention_kwargs": options})
    found = [arguments_of(call)["joint_attention_kwargs"]["ip_adapter_image_embeds"] for call in (first, second)]
    assert [float(embeddings[0]) for embeddings in found] == [1.0, 2.0]


def test_conditioning_of_two_calls_a_turn_is_repeated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not anew for every wave, the one in the place of the other."""
    build, call = tiny.PIPELINES["flux"]
    fast = srds_fast.compile(build(), exact=True, method="srds")
    run(fast, call, true_cfg_scale=3.0, negative_prompt="dog")
    made = instances(monkeypatch, TiledConditioning)
    run(fast, call, true_cfg_scale=3.0, negative_prompt="dog")
    assert fast.report.path == "takeover"
    # prompt and pooled prompt, of either kind
    assert len(made) == 4


@pytest.mark.parametrize("number", [numpy.float32, torch.tensor], ids=["numpy", "torch"])
def test_guidance_given_as_another_kind_of_number_is_looked_at(number: Any) -> None:
    """What was found for one value is not taken for another."""
    build, call = tiny.PIPELINES["stable_diffusion"]
    pipe = build()
    fast = srds_fast.compile(pipe, method="sequential")
    for scale in (2.0, 9.0):
        more = {"guidance_scale": number(scale), "num_inference_steps": 2}
        assert_close(*(run(each, call, **more) for each in (fast, pipe)))


def test_guidance_of_a_subclass_is_found_anew_in_every_call() -> None:
    """Its properties may be anything."""
    build, call = tiny.PIPELINES["stable_diffusion"]
    plain = build()

    class Boosted(type(plain)):  # type: ignore[misc]
        boost = 1.0

        @property
        def guidance_scale(self) -> float:
            return float(self._guidance_scale) * self.boost

    pipe = Boosted(**plain.components, requires_safety_checker=False)
    fast = srds_fast.compile(pipe, method="sequential")
    for boost in (1.0, 2.0):
        pipe.boost = boost
        assert_close(*(run(each, call, guidance_scale=3.0, num_inference_steps=2) for each in (fast, pipe)))


def test_a_kind_of_call_is_rehearsed_once_and_another_kind_calls_no_network_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build, call = tiny.PIPELINES["stable_diffusion"]
    fast = srds_fast.compile(build(), method="srds", exact=True)
    made, results, checks = instances(monkeypatch, Inference), [], []
    for scale in (5.0, 5.0, 3.0, 5.0):
        results.append(run(fast, call, guidance_scale=scale))
        checks.append((len(made), fast.report.check_calls, fast.report.rehearsal_calls))
    assert checks == [(1, 3, 0), (1, 0, 0), (2, 0, 0), (2, 0, 0)]
    assert [torch.equal(results[0], each) for each in results] == [True, True, False, True]
