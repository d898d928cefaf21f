"""Plans of pipelines: measured at a call, calibrated, made elsewhere; warm starts and early ends of every method."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch

import srds_fast
from srds_fast.planner.choose import fixed_at, plans_of
from srds_fast.planner.cost_curve import CostCurve
from srds_fast.planner.search import Known


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = tiny.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(seed), "output_type": "latent"}


def test_an_auto_call_of_a_pipeline_measures_once_and_equals_stock(pipe: Any) -> None:
    fast = srds_fast.compile(pipe, explore=0)
    state = torch.get_rng_state()
    plan = fast.plan_for("a cat", num_inference_steps=20, measure=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert fast.report is None
    calls: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda *given: calls.append(1))
    found = fast("a cat", num_inference_steps=20, **seeded()).images
    handle.remove()
    assert len(calls) == fast.report.waves, "nothing is measured again"
    assert fast.report.method == plan.method
    expected = pipe("a cat", num_inference_steps=20, **seeded()).images
    assert float((found - expected).abs().mean()) < 4e-3
    assert plans_of(plan.prediction, 20, {}, stochastic=False).keys() == set(plan.prediction.candidates)


def test_auto_measures_two_network_calls_a_step() -> None:
    """True guidance of Flux: the output of a turn is a sum of what two calls return."""
    build, call = tiny.PIPELINES["flux"]
    pipe, call = build(), {**call, "negative_prompt": "a dog", "true_cfg_scale": 3.0, "num_inference_steps": 8}
    fast = srds_fast.compile(pipe, explore=0)
    assert fast.plan_for(**call, measure=True).prediction is not None
    found, expected = (each(**{**call, **seeded()})[0] for each in (fast, pipe))
    assert float((found - expected).abs().mean()) <= 4e-3
    assert fast.report.path == "takeover"
    assert fast.report.plan_state == "measured"


def calibrated(fast: Any, curve: CostCurve) -> srds_fast.Plan:
    """Calibrated for 12 steps as if calls cost what the curve says."""
    fast.plan_for("a cat", num_inference_steps=12, measure=True)
    costs = fast._srds.planner.costs
    for key in list(costs._kept):
        costs._kept[key] = Known(curve)
    return fast.calibrate(["a cat", "a dog"], num_inference_steps=12, num_samples=2)


def test_calibration_fixes_the_iterations_of_its_kind_of_call_alone(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = srds_fast.compile(pipe, num_blocks=4, explore=0)  # few plans to compare
    plan = calibrated(fast, CostCurve((1, 1000), (1.0, 1.0)))
    assert plan.calibrated
    assert plan.method != "sequential"
    assert fixed_at(plan, plan.max_iterations) == plan
    sequential = srds_fast.compile(pipe, method="sequential")
    for seed, prompt in enumerate(["a cat", "a dog"]):
        found = fast(prompt, num_inference_steps=12, **seeded(seed)).images
        expected = sequential(prompt, num_inference_steps=12, **seeded(seed)).images
        assert float((found - expected).abs().mean()) <= 4e-3
        assert fast.report.stopped_by == ["fixed iterations"]
        assert fast.report.converged == [False], "calibration, of other samples, is no estimate of this one"
        assert fast.report.waves == plan.program().spent(plan.max_iterations).waves
    embeds = torch.randn(1, 154, 32, generator=torch.Generator().manual_seed(2))
    for other in (
        {"prompt": ["a cat", "a dog"]},
        {"prompt": "a cat", "guidance_scale": 1.0},
        {"prompt": "a cat", "guidance_scale": 7.0},
        {"prompt_embeds": embeds, "negative_prompt_embeds": 0 * embeds},
    ):
        fast(**other, num_inference_steps=12, **seeded())
        assert "fixed iterations" not in fast.report.stopped_by
        assert "a calibrated plan was left out: it is for another guidance, batch" in fast.report.left_out[-1]
        with pytest.raises(srds_fast.PlanMismatch, match="calibrated for another guidance, batch"):
            srds_fast.compile(pipe, plan=plan)(**other, num_inference_steps=12, **seeded())
    fast("a ship", num_inference_steps=12, **seeded())
    assert (fast.report.plan_reason, fast.report.left_out) == (plan.prediction.why, [])
    threads = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads + 1)
        fast("a cat", num_inference_steps=12, **seeded())
        assert "fixed iterations" not in fast.report.stopped_by
    fast.reset()
    fast("a cat", num_inference_steps=12, **seeded())
    assert not any(entry for entry in fast._srds.planner.calibrated)


def test_one_prompt_is_that_prompt_and_not_its_letters(pipe: Any) -> None:
    encoded: list[list[int]] = []
    pipe.text_encoder.register_forward_pre_hook(lambda encoder, given: encoded.append(given[0].flatten().tolist()))
    for prompts in (["a cat"], "a cat", {"prompt": "a cat"}):
        fast = srds_fast.compile(pipe, method="srds", num_blocks=2)
        fast.calibrate(prompts, num_inference_steps=4, num_samples=1)
        seen, encoded[:] = {tuple(each) for each in encoded}, []
        assert seen == {tuple(pipe.tokenizer(text, padding="max_length").input_ids) for text in ("a cat", "")}


def test_two_calibrations_stand_side_by_side_and_know_an_embedded_guidance() -> None:
    """Flux gives its guidance to the network, which makes other samples need other iterations."""
    build, call = tiny.PIPELINES["flux_guidance"]
    fast = srds_fast.compile(build(), method="srds", num_blocks=3)
    call = {name: value for name, value in call.items() if name != "prompt"} | {"num_inference_steps": 6}
    plans = [fast.calibrate(["a cat"], num_samples=1, **call, guidance_scale=scale) for scale in (1.5, 6.0)]
    assert plans[0].context != plans[1].context
    for scale, left_out in ((1.5, 0), (6.0, 0), (3.0, 1)):
        fast(prompt="a dog", **call, guidance_scale=scale, generator=torch.Generator().manual_seed(0))
        assert len(fast.report.left_out) == left_out


def test_calibration_chooses_the_sequential_sampler_where_rows_are_dear(pipe: Any) -> None:
    assert calibrated(srds_fast.compile(pipe), CostCurve((1, 32), (1.0, 32.0))).method == "sequential"


@pytest.mark.parametrize(
    ("settings", "wrong", "why"),
    [
        ({}, {"callback_on_step_end": lambda p, i, t, kwargs: kwargs}, "for every sample of every plan"),
        ({"method": "paradigms"}, {"num_samples": 1}, "slides"),
        ({}, {"num_samples": 0}, "num_samples"),
        ({}, {"quantile": 0.0}, "quantile"),
        ({}, {"quantile": "95 %"}, "quantile"),
        ({"exact": True}, {}, "nothing to calibrate"),
        ({}, {"generator": 3}, "generator"),
    ],
)
def test_calibrations_that_cannot_be_made_are_refused(
    pipe: Any, settings: dict[str, Any], wrong: dict[str, Any], why: str
) -> None:
    with pytest.raises(srds_fast.InvalidArgument, match=why):
        srds_fast.compile(pipe, **settings).calibrate(["a cat"], num_inference_steps=8, **wrong)


def test_a_call_with_a_plan_made_elsewhere_is_refused(pipe: Any) -> None:
    plan = srds_fast.compile(pipe).plan_for("a cat", num_inference_steps=20, measure=True)
    elsewhere = dataclasses.replace(plan, context=dataclasses.replace(plan.context, network="another"))
    with pytest.raises(srds_fast.PlanMismatch, match="another network"):
        srds_fast.compile(pipe, plan=elsewhere)("a cat", num_inference_steps=20)
    srds_fast.compile(pipe, plan=plan)("a cat", num_inference_steps=20)


def test_a_warm_start_takes_fewer_waves_to_the_same_sample(pipe: Any) -> None:
    fast = srds_fast.compile(pipe, method="collocation")
    cold = fast("a cat", num_inference_steps=40, **seeded()).images
    assert fast.trajectory is None
    waves = fast.report.waves
    kept = fast("a cat", num_inference_steps=40, keep_trajectory=True, **seeded()).images
    torch.testing.assert_close(kept, cold, rtol=0, atol=0)
    trajectory = fast.trajectory
    assert trajectory.shape == (41, *cold.shape)
    torch.testing.assert_close(trajectory[-1], cold)
    warm = fast("a cat", num_inference_steps=40, warm_start=trajectory, **seeded()).images
    assert fast.report.waves < waves
    assert float((warm - cold).abs().mean()) < 8e-3
    for method in ("srds", "collocation"):  # it takes none; it is of other steps
        with pytest.raises(srds_fast.InvalidArgument, match="warm_start"):
            srds_fast.compile(pipe, method=method)("a cat", num_inference_steps=9, warm_start=trajectory)


@pytest.mark.parametrize("method", ["auto", "sequential", "collocation", "chords"])
def test_an_early_interrupt_ends_a_call_of_every_method(pipe: Any, method: str) -> None:
    def interrupt(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 2
        return kwargs

    fast = srds_fast.compile(pipe, method=method)
    image = fast("a cat", num_inference_steps=20, callback_on_step_end=interrupt, **seeded()).images
    assert bool(image.isfinite().all())
    assert (fast.report.interrupted, fast.trajectory) == (True, None)
