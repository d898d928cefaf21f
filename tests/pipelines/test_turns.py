"""Loops that are not known make the turns of the rows themselves: exact, or refused with the reason."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from typing import Any

import modern
import PIL.Image
import pytest
import tiny
import torch
from calls import assert_close, instances, latents, watched
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from thinned import thinned_product
from torch import Tensor

import srds_fast
from srds_fast import UnsupportedPipeline
from srds_fast.pipelines.lockstep.rehearsal import Rehearsal

STEPS = 9
MODES: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "exact": {"method": "srds", "exact": True},
    "collocation": {"method": "collocation", "exact": True},
}


class OwnLoop(DDIMPipeline):
    """A pipeline with a loop of its own, which its subclasses change."""

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        num_inference_steps: int = STEPS,
        output_type: str = "latent",
    ) -> tuple[Tensor]:
        shape = (batch_size, 3, 16, 16)
        x = self._kept = randn_tensor(shape, generator=generator)
        self._known = randn_tensor(shape, generator=torch.Generator().manual_seed(1))
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            m = self.output(i, t, x)
            x, *self._beside = self.scheduler.step(m, t, x, return_dict=False)
            x = self.after(i, x)
        return (self.end(x),)

    def end(self, x: Tensor) -> Tensor:
        return x

    def output(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        found: Tensor = self.unet(self.scheduler.scale_model_input(x, t), t).sample
        return found

    def after(self, i: int, x: Tensor) -> Tensor:
        return x


class ByStep(OwnLoop):
    """Everything differs from step to step: weights, how many calls there are, the noise of the next step."""

    def output(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        m = super().output(i, t, x) * (1 + 0.1 * i)
        return m if i % 3 else m + 0.1 * super().output(i, t, 0.9 * x)

    def after(self, i: int, x: Tensor) -> Tensor:
        following = i < len(self.scheduler.timesteps) - 1
        known = self._known * float(self.scheduler.timesteps[i + 1]) / 1000 if following else self._known
        return torch.where(torch.arange(16) < 5, known, x)


class Weighted(OwnLoop):
    """The guidance changes from step to step, and the network is called with other arguments in some of them."""

    def output(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        if i < 4:
            return super().output(i, t, x) * (1 + 0.1 * i)
        found: Tensor = self.unet(self.scheduler.scale_model_input(x, t), t, return_dict=False)[0]
        return -0.5 * found + 1.5 * self.unet(x, self._known.mean() * 0 + 10 * i, return_dict=False)[0]


class Nested(OwnLoop):
    """A network call whose input is the output of another one."""

    def output(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        return super().output(i, t, x + 0.1 * super().output(i, t, x))


class WritesInPlace(OwnLoop):
    """The state, the network's input and its output are all written into."""

    def output(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        if i == 0:
            self._input = torch.empty_like(x)
        self._input.copy_(x)
        return super().output(i, t, self._input).mul_(0.9)

    def after(self, i: int, x: Tensor) -> Tensor:
        return self._kept.copy_(x)


class Slow(WritesInPlace):
    """Its own code takes a hundredth of a second a turn, at least."""

    def after(self, i: int, x: Tensor) -> Tensor:
        time.sleep(0.01)
        return super().after(i, x)


class TwoStates(OwnLoop):
    """Two states, stepped by two schedulers, each of which the network's output of the other depends on."""

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        num_inference_steps: int = STEPS,
        output_type: str = "latent",
        callback_on_step_end: Any = None,
    ) -> tuple[Tensor]:
        x = randn_tensor((batch_size, 3, 16, 16), generator=generator)
        y = randn_tensor((batch_size, 3, 8, 8), generator=generator)
        other = copy.deepcopy(self.scheduler)
        for scheduler in (self.scheduler, other):
            scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            m, n = self.output(i, t, x + y.repeat(1, 1, 2, 2)), self.output(i, t, y + x[..., :8, :8])
            x = self.scheduler.step(m, t, x, return_dict=False)[0]
            y = other.step(n, t, y, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {"latents": x})
        return (torch.cat([x.flatten(), y.flatten()]),)


class ReadsX0(OwnLoop):
    """It uses the x0 that each step returns."""

    def after(self, i: int, x: Tensor) -> Tensor:
        return x + 0.1 * self._beside[0]


class EndsWithX0(OwnLoop):
    """As the loop of latent consistency models."""

    def end(self, x: Tensor) -> Tensor:
        return self._beside[0] + 0


class Momentum(OwnLoop):
    def output(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        m = super().output(i, t, x)
        self._average = m if i == 0 else 0.5 * (self._average + m)
        return self._average


class Counter(OwnLoop):
    _turns = 0

    def output(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        self._turns += 1
        return super().output(i, t, x) * (1 + 0.1 * (self._turns % 2))


class Random(OwnLoop):
    def output(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        return super().output(i, t, x + 0.1 * torch.randn(x.shape))


class SoftMask(OwnLoop):
    def after(self, i: int, x: Tensor) -> Tensor:
        return 0.9 * x + 0.1 * self._known


class Bounded(OwnLoop):
    def after(self, i: int, x: Tensor) -> Tensor:
        return x.clamp(-3, 3)


class SwitchesLayers(OwnLoop):
    """It changes its network for some calls, as guidance by skipped layers does."""

    def output(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        block = self.unet.mid_block
        hook = block.register_forward_hook(lambda module, given, found: 0.5 * found) if i % 2 else None
        try:
            return super().output(i, t, x)
        finally:
            if hook is not None:
                hook.remove()


class FadesOut(OwnLoop):
    """It changes its network for the steps that follow."""

    def output(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        self.unet.conv_norm_out.eps = 1e-6 if i < 4 else 10.0
        return super().output(i, t, x)


class WritesWeights(OwnLoop):
    def output(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        if i == 4:
            self.unet.conv_out.weight.mul_(0.5)
        return super().output(i, t, x)


class TwoSteps(OwnLoop):
    def after(self, i: int, x: Tensor) -> Tensor:
        if i % 2 == 0:
            return x
        self.scheduler.step(x, self.scheduler.timesteps[i], x)
        return x


class Leaves(OwnLoop):
    def after(self, i: int, x: Tensor) -> Tensor:
        if i == 5:
            raise StopIteration
        self._reached = x
        return x

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        try:
            return super().__call__(*args, **kwargs)
        except (StopIteration, RuntimeError):
            return (self._reached,)


EXACT = [OwnLoop, Weighted, ByStep, Nested, WritesInPlace, TwoStates]
FAULTS: dict[type[OwnLoop], str] = {
    Momentum: "gives another result for the same network outputs when the steps are made in another order",
    Counter: "keeps something from step to step, such as momentum or a counter",
    Random: "calls its network with other input|draws random numbers in its loop",
    SoftMask: "in another way than by replacing a part of them",
    Bounded: "in another way than by replacing a part of them",
    SwitchesLayers: "changes the UNet2DModel around single calls",
    FadesOut: "changes the UNet2DModel around single calls",
    TwoSteps: "or twice in one turn",
    Leaves: "ended before its last step",
    ReadsX0: "uses what its scheduler's step returns beside the sample",
}


def own(cls: type[OwnLoop], scheduler: Any = None) -> Any:
    pipe = tiny.ddim(DDIMScheduler(**tiny.SD_NOISE))
    found = cls(pipe.unet, pipe.scheduler)
    if scheduler is not None:
        found.scheduler = scheduler
    return tiny.ready(found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cls", EXACT)
def test_a_loop_whose_turns_depend_on_step_and_state_alone_is_exact(cls: type[OwnLoop], mode: str) -> None:
    pipe = own(cls)
    expected = latents(pipe, batch_size=2)
    fast = srds_fast.compile(pipe, **MODES[mode], strict=True)
    first = latents(fast, batch_size=2)
    assert_close(first, expected)
    assert fast.report.path == ("takeover" if cls in (OwnLoop, Weighted) else "drive")
    assert fast.report.left_out == []
    if mode != "sequential":
        assert fast.report.waves < fast.report.rows
        assert fast.report.rehearsal_calls + fast.report.check_calls > 0
        assert "rehearsal" in str(fast.report) or "checking" in str(fast.report)
    with watched(pipe.unet) as seen:
        again = latents(fast, batch_size=2)
    assert torch.equal(again, first), "the same seed gives the same bits, also where the loop is known already"
    assert fast.report.rehearsal_calls == fast.report.check_calls == 0
    calls = len({i % 3 for i in range(STEPS)})  # of ByStep, at most
    assert len(seen) <= fast.report.waves * calls
    assert torch.equal(latents(pipe, batch_size=2), expected)


@pytest.mark.parametrize("cls", FAULTS)
def test_a_loop_that_keeps_more_than_its_state_runs_as_stock(cls: type[OwnLoop]) -> None:
    def called(pipe: Any) -> Tensor:
        torch.manual_seed(3)
        return latents(pipe)

    expected, fast = called(own(cls)), srds_fast.compile(own(cls), method="srds")
    found = called(fast)
    assert torch.equal(found, expected)
    assert fast.report.method == "stock"
    assert "cannot run in parallel" in fast.report.fallback_reason or "loop ended" in fast.report.fallback_reason
    with pytest.raises(UnsupportedPipeline, match=FAULTS[cls]):
        called(srds_fast.compile(own(cls), method="srds", strict=True))


def test_the_loops_own_code_counts_in_what_turns_cost() -> None:
    fast = srds_fast.compile(own(Slow))
    for _ in range(2):  # a later call makes no rehearsal that shows it
        latents(fast)
        assert fast.report.path == "drive"
        session = fast._srds.last.session
        assert session.pricing.measure_overhead(session.plan) >= STEPS * 0.01


def test_a_loop_that_writes_to_weights_is_an_error() -> None:
    """What they held before is not known, so the stock loop cannot follow."""
    with pytest.raises(UnsupportedPipeline, match=r"UNet2DModel\.conv_out\.weight was written to in the call"):
        latents(srds_fast.compile(own(WritesWeights), method="srds"))


def test_a_loop_that_writes_into_what_its_scheduler_keeps_runs_as_stock() -> None:
    """Heun's second turn departs from the state of the first one, which the loop has written into by then."""
    pipe = own(WritesInPlace, HeunDiscreteScheduler(**tiny.SD_BETAS))
    fast = srds_fast.compile(pipe, method="srds", exact=True)
    assert torch.equal(latents(fast), latents(pipe))
    assert "has kept for a later step" in fast.report.fallback_reason


def test_a_callback_of_a_loop_with_two_states_runs_as_stock() -> None:
    pipe = own(TwoStates)
    expected, stock_told = listen(pipe, lambda step, x: None)
    fast = srds_fast.compile(pipe, method="srds")
    found, told = listen(fast, lambda step, x: None)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, told, stock_told))
    assert "several states at once" in fast.report.fallback_reason


SCHEDULERS: dict[str, Callable[[], Any]] = {
    # its input scale depends on what it has stepped before
    "second order": lambda: KDPM2DiscreteScheduler(**tiny.SD_BETAS),
    "noisy": lambda: EulerAncestralDiscreteScheduler(**tiny.SD_BETAS, steps_offset=1),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("cls", [ByStep, Nested])
def test_each_turn_sees_the_scheduler_as_it_is_before_its_step(cls: type[OwnLoop], scheduler: str) -> None:
    pipe = own(cls, SCHEDULERS[scheduler]())
    try:
        fast = srds_fast.compile(pipe, method="srds", exact=True)
    except srds_fast.UnsupportedScheduler:
        pytest.skip("its history is longer than the solvers carry")
    torch.manual_seed(5)
    expected, after = latents(pipe), torch.get_rng_state()
    torch.manual_seed(5)
    assert_close(latents(fast), expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert fast.report.fallback_reason is None


def test_samples_of_a_batch_end_together_as_a_loop_may_mix_them() -> None:
    class Mixed(OwnLoop):
        def output(self, i: int, t: Tensor, x: Tensor) -> Tensor:
            m = super().output(i, t, x)
            return m + 0.05 * m.mean(0, keepdim=True)

    pipe = own(Mixed)
    fast = srds_fast.compile(pipe, method="srds", tolerance=1e-3)
    found = latents(fast, batch_size=3, num_inference_steps=25)
    expected = latents(pipe, batch_size=3, num_inference_steps=25)
    assert float((found - expected).abs().flatten(1).mean(1).max()) <= 1e-3
    assert fast.report.evaluations == 3 * fast.report.rows


def test_what_is_refused_once_is_refused_without_another_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = own(Momentum)
    fast = srds_fast.compile(pipe, method="srds")
    turns = []
    for _ in range(2):
        made = instances(monkeypatch, Rehearsal)
        latents(fast)
        assert "momentum" in fast.report.fallback_reason
        turns.append(sum(each.made for each in made))
    assert turns[0] > STEPS
    assert turns[1] == 0


@pytest.mark.parametrize("is_sample", [True, False])
def test_a_loop_ends_with_x0_where_that_is_the_sample(is_sample: bool) -> None:
    pipe = own(EndsWithX0, DDIMScheduler(**tiny.SD_NOISE | {"set_alpha_to_one": is_sample}))
    expected = latents(pipe)
    fast = srds_fast.compile(pipe, method="srds", exact=True)
    assert_close(latents(fast), expected)
    assert (fast.report.path == "stock") != is_sample
    assert is_sample or "beside the sample" in fast.report.fallback_reason


def test_a_plan_that_cannot_pay_takes_one_step_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that cannot be merged cost as much as steps: "auto" does not take them."""

    class Alone(type(tiny.ddim().unet)):  # type: ignore[misc]
        def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert len(sample) == 1
            return super().forward(sample, *args, **kwargs)

    pipe = own(OwnLoop)
    pipe.unet.__class__ = Alone
    expected = latents(pipe)
    auto, asked = srds_fast.compile(pipe), srds_fast.compile(pipe, method="srds", exact=True)
    for fast, method in ((auto, "sequential"), (asked, "srds")):
        assert_close(latents(fast), expected)
        assert fast.report.method == method
        assert any("one row at a time" in reason for reason in fast.report.left_out)


@pytest.mark.parametrize(("name", "mode"), thinned_product(modern.PIPELINES, MODES))
def test_pipelines_of_newer_classes_are_exact(name: str, mode: str) -> None:
    build, call = modern.PIPELINES[name]
    pipe = build()
    expected = latents(pipe, **call)
    fast = srds_fast.compile(pipe, **MODES[mode], strict=True)
    found = latents(fast, **call)
    assert bool(expected.isfinite().all())
    assert_close(found, expected)
    assert fast.report.path == ("drive" if name in ("qwen-image", "z-image") else "takeover")
    assert fast.report.left_out == []
    if (
        fast.report.path == "drive"
        and mode == "sequential"
        and "euler" in type(pipe.scheduler).__name__.lower()
        and "xl" not in name
    ):
        assert torch.equal(found, expected)
    assert torch.equal(latents(pipe, **call), expected)


def test_guidance_with_momentum_is_refused() -> None:
    pipe, call = modern.with_momentum(), modern.PIPELINES["hunyuanvideo 1.5"][1]
    with pytest.raises(UnsupportedPipeline, match="momentum"):
        latents(srds_fast.compile(pipe, method="srds", strict=True), **call)


def listen(pipe: Any, act: Callable[[int, Tensor], Tensor | None], **call: Any) -> tuple[Tensor, list[Tensor]]:
    """Latents of a call, and those that its callback was told, which `act` may change."""
    told: list[Tensor] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert step == len(told)
        told.append(tensors["latents"].clone())
        changed = act(step, tensors["latents"])
        return tensors if changed is None else {"latents": changed}

    return latents(pipe, **call, callback_on_step_end=callback), told


ACTS: dict[str, Callable[[int, Tensor], Tensor | None]] = {
    "looks": lambda step, x: None,
    "changes": lambda step, x: 1.1 * x if step == 4 else None,
    "changes the last": lambda step, x: 1.1 * x if step == STEPS - 1 else None,
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", ["qwen-image", "flux inpaint", "sdxl controlnet, window"])
def test_callbacks_see_and_do_what_they_would_in_the_stock_loop(name: str, act: str) -> None:
    build, call = modern.PIPELINES[name]
    pipe = build()
    expected, stock_told = listen(pipe, ACTS[act], **call)
    fast = srds_fast.compile(pipe, method="srds", exact=True)
    found, told = listen(fast, ACTS[act], **call)
    assert_close(found, expected)
    for state, stock_state in zip(told, stock_told, strict=True):
        assert_close(state, stock_state)
    assert fast.report.path == ("drive" if name == "qwen-image" else "takeover")
    assert (fast.report.fallback_reason is None) == (act == "looks")


def test_an_interrupt_gives_the_newest_whole_sample() -> None:
    build, call = modern.PIPELINES["wan"]
    pipe = build()
    fast = srds_fast.compile(pipe, method="srds", tolerance=0.0)

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 9
        return tensors

    call = {**call, "num_inference_steps": 16}
    checkpoints = [each.latents for each in fast.stream(**call, generator=torch.Generator().manual_seed(0))]
    found = latents(fast, **call, callback_on_step_end=interrupt)
    assert fast.report.interrupted
    assert fast.report.waves < 16
    largest = float(found.abs().max())
    assert any(float((found - checkpoint).abs().max()) <= 1e-5 * largest for checkpoint in checkpoints[:-1])
    assert torch.equal(latents(fast, **call), checkpoints[-1])


def test_previews_and_warm_ups() -> None:
    build, call = modern.PIPELINES["ltx"]
    fast = srds_fast.compile(build(), method="srds", tolerance=0.0)
    call = {name: value for name, value in call.items() if name != "output_type"}
    state = torch.get_rng_state()
    warmed = fast.warmup(**call, num_inference_steps=STEPS, output_type="latent")
    assert warmed.check_calls > 0
    assert torch.equal(torch.get_rng_state(), state)
    seen = list(fast.stream(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0)))
    assert fast.report.check_calls == 0
    assert [each.iteration for each in seen] == list(range(len(seen)))
    assert torch.equal(seen[-1].latents, latents(fast, **call))


GRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "given sigmas": ("qwen-image", {"sigmas": [1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1]}),
    "strength": ("flux inpaint", {"strength": 0.6}),
    "one step": ("wan", {"num_inference_steps": 1}),
    "two steps": ("flux inpaint", {"num_inference_steps": 2}),
    "no guidance": ("wan", {"guidance_scale": 1.0}),
    "half a batch": ("sana", {"num_images_per_prompt": 2, "generator": None}),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_other_grids_and_batches(grid: str) -> None:
    name, more = GRIDS[grid]
    build, call = modern.PIPELINES[name]
    pipe = build()
    call = {**call, **more}
    call.pop("generator", None)
    fast = srds_fast.compile(pipe, **({} if "one" in grid else {"method": "srds"}), exact=True, strict=True)
    assert_close(latents(fast, **call), latents(pipe, **call))
    assert fast.report.path == ("drive" if grid in ("given sigmas", "one step") else "takeover")


def test_what_is_known_of_a_loop_is_seen_not_to_be_true_of_another_mask() -> None:
    build, call = modern.PIPELINES["flux inpaint"]
    pipe = build()
    fast = srds_fast.compile(pipe, method="srds", exact=True)
    # nothing of the image is known: the loop keeps all of its state
    nothing = PIL.Image.new("L", call["mask_image"].size, 255)
    reasons = []
    for mask in (nothing, call["mask_image"], call["mask_image"], nothing):
        found = latents(fast, **{**call, "mask_image": mask})
        assert_close(found, latents(pipe, **{**call, "mask_image": mask}))
        reasons.append(fast.report.fallback_reason)
    assert [reason is None for reason in reasons] == [True, False, True, True]
    assert "than in earlier calls" in reasons[1]


@pytest.mark.parametrize("method", ["sequential", "srds"])
def test_what_reads_the_scheduler_is_no_time_of_the_run(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner compares the seconds of runs: a first call, which steps the scheduler to read it, is like the others.

    The clock goes on by a second whenever a scheduler steps, and at no other time.
    """
    now = [0.0]

    class Slow(DDIMScheduler):
        @functools.wraps(DDIMScheduler.step)  # loops look at its signature
        def step(self, *args: Any, **kwargs: Any) -> Any:
            now[0] += 1.0
            return super().step(*args, **kwargs)

    fast = srds_fast.compile(tiny.stable_diffusion(Slow(**tiny.SD_BETAS)), method=method)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    latents(fast, prompt="a cat")
    assert fast.report.seconds == 0.0
    assert fast.report.rehearsal_seconds >= fast.report.num_inference_steps
    latents(fast, prompt="a cat")
    assert (fast.report.seconds, fast.report.rehearsal_seconds) == (0.0, 0.0)
