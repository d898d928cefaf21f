"""The stock loop beside ours: timed while a kind of call is explored, and taken where it is the fastest."""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMPipeline
from torch import Tensor

import srds_fast
from bench.workloads.classes import CASES
from srds_fast.engine.cancellation import Watch
from srds_fast.pipelines.state import PipelineCall
from srds_fast.pipelines.stock import _twin
from srds_fast.planner.exploration import STOCK

N = 10
CALL: dict[str, Any] = {"num_inference_steps": N, "output_type": "latent"}


@pytest.mark.parametrize("kind", ["stable_diffusion", "flux"])
def test_timing_the_stock_loop_changes_nothing_that_a_user_sees(kind: str) -> None:
    make, arguments = tiny.PIPELINES[kind]
    pipe = make()
    fast = srds_fast.compile(pipe, tolerance=1e-9)
    generator = torch.Generator().manual_seed(0)
    expected = torch.as_tensor(pipe(**{**arguments, **CALL}, generator=torch.Generator().manual_seed(0))[0])
    before = dict(vars(pipe))
    states = torch.get_rng_state()
    for _ in range(3):
        generator.manual_seed(0)
        found = torch.as_tensor(fast(**{**arguments, **CALL}, generator=generator)[0])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        after = generator.get_state()
        generator.manual_seed(0)
        pipe(**{**arguments, **CALL}, generator=generator)
        assert torch.equal(after, generator.get_state()), "the generator is where a stock call leaves it"
    assert torch.equal(states, torch.get_rng_state())
    assert all(vars(pipe)[name] is value for name, value in before.items() if not name.startswith("_"))
    (exploration,) = fast._srds.explorations.values()
    assert STOCK in exploration._seconds
    assert exploration.settled


def chosen(fast: Any) -> None:
    """Let the exploration of the calls so far choose the stock loop."""
    for exploration in fast._srds.explorations.values():
        exploration.state, exploration._choice, exploration._why = "frozen", STOCK, "of a test"


def test_a_call_whose_kind_chose_the_stock_loop_is_the_stock_call(sd: Any, caplog: pytest.LogCaptureFixture) -> None:
    fast = srds_fast.compile(sd)
    fast("a cat", **CALL)
    chosen(fast)
    caplog.clear()

    def images(pipe: Any, prompt: str = "a cat", **more: Any) -> torch.Tensor:
        return torch.as_tensor(pipe(prompt, **CALL, **more, generator=torch.Generator().manual_seed(1)).images)

    assert torch.equal(images(fast, "a dog"), images(sd, "a dog"))
    report = fast.report
    assert (report.method, report.plan_state, report.plan_reason) == ("stock", "frozen", "of a test")
    assert report.fallback_reason is None
    assert not caplog.records, "it is no fallback"
    for more in ({"guidance_scale": 3.0}, {"num_images_per_prompt": 2}, {"height": 24}):
        images(fast, **more)
        assert fast.report.method != "stock", "another kind of call"
    fast("a cat", **CALL, keep_trajectory=True)
    assert fast.trajectory is not None
    fast.reset()
    images(fast)
    assert fast.report.method != "stock"


def test_stock_calls_in_threads_have_schedulers_of_their_own_and_can_be_interrupted(sd: Any) -> None:
    fast = srds_fast.compile(sd)
    fast("a cat", **CALL)
    chosen(fast)

    def images(pipe: Any, seed: int) -> torch.Tensor:
        return torch.as_tensor(pipe("a cat", **CALL, generator=torch.Generator().manual_seed(seed)).images)

    expected = [images(sd, seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda seed: images(fast, seed), range(6)))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    calls: list[int] = []

    def interrupt(module: Any, args: Any, output: Any) -> None:
        calls.append(1)
        fast._interrupt = len(calls) == 3

    handle = sd.unet.register_forward_hook(interrupt)
    images(fast, 0)
    handle.remove()
    assert len(calls) == 3


REASONS = {
    # its loop reads the attention that a processor of its own has kept
    "StableDiffusionSAGPipeline": "into UNet2DConditionModel.mid_block.attentions.0 and uses what these see",
    "StableDiffusionPanoramaPipeline": "copies what its scheduler holds and puts it back, to step parts of its state",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_says_what_in_the_loop_was_found(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    fast = srds_fast.compile(pipe, method="srds")

    def called(each: Any) -> torch.Tensor:
        return torch.as_tensor(each(**case.call, num_inference_steps=3, generator=torch.Generator().manual_seed(0))[0])

    assert torch.equal(called(fast), called(pipe))
    assert REASONS[name] in fast.report.fallback_reason
    assert fast.report.num_inference_steps >= 3


def test_the_copy_that_a_stock_loop_runs_on_needs_no_collector(sd: Any) -> None:
    """It holds the scheduler, whose step is replaced by a function that knows it."""
    fast, steps, x = srds_fast.compile(sd), list[int](), torch.zeros(1, 4, 8, 8)
    gc.disable()
    try:
        nobody = Watch((), None)
        with _twin(PipelineCall(fast, (), {}, {}), {}, nobody, lambda: steps.append(1), interrupts=False) as twin:
            scheduler = weakref.ref(twin.scheduler)
            twin.scheduler.set_timesteps(2)
            twin.scheduler.step(x, twin.scheduler.timesteps[0], x)
        del twin
        assert (steps, scheduler()) == ([1], None)
    finally:
        gc.enable()


def test_a_plan_is_timed_with_what_its_calls_take_before_the_first_wave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A turn of the loop, which shows its network calls, takes 5 seconds here, and a network call takes one."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pipe = tiny.ddim()
    network_class = type(pipe.unet)

    class Slow(network_class):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **keywords: Any) -> Any:
            now[0] += 1.0
            return super().forward(*args, **keywords)

    class Turns(DDIMPipeline):
        @torch.no_grad()
        def __call__(self, num_inference_steps: int, generator: torch.Generator) -> tuple[Tensor]:
            x = torch.randn(1, 3, 16, 16, generator=generator)
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
                now[0] += 5.0
            return (x,)

    pipe.unet.__class__ = Slow
    fast = srds_fast.compile(Turns(pipe.unet, pipe.scheduler))
    for seed in range(4):
        fast(num_inference_steps=2 * N, generator=torch.Generator().manual_seed(seed))
    report = fast.report
    assert report.plan_state == "frozen"
    assert report.seconds == report.waves + 5.0
    assert "sequential: 25.0 s; stock: 120.0 s" in report.plan_reason
